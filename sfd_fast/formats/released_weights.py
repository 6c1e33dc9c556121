"""What the authors published and where it stands: names of files on the hub, and the settings that belong to them.

Sources: the authors' README (folders, addresses) and configurations (file names). The table for people is in
docs/released-weights.md.
"""

from typing import NamedTuple

from sfd_fast.config import GuidanceConfig, SFDConfig, TransportConfig
from sfd_fast.config.presets import PRESETS
from sfd_fast.config.recipes import recipe
from sfd_fast.formats.released_config import to_released

REPOSITORY = "SFD-Project/SFD"
CODEC_REPOSITORY = "hustvl/va-vae-imagenet256-experimental-variants"
CODEC_FILE = "ldm-imagenet256-f16d32-50ep.ckpt"
LATENTS = "imagenet1k-latents/sdvae_f16d32_semvaebasech16_repadinov2_vitb14_reg/imagenet_train_256"
STATISTICS_FILES = (f"{LATENTS}/latents_stats.pt", f"{LATENTS}/latents_sv_stats.pt")
REFERENCE_URL = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
FOLDERS = {"XL": "sfd_xl", "XXL": "sfd_1p0", "B_GUIDE": "sfd_autoguidance_b"}
"""a preset's folder below model_weights/"""
VARIANTS = {"xl-80ep": ("XL", "80ep"), "xl-800ep": ("XL", "800ep"), "xxl-80ep": ("XXL", "80ep"),
            "xxl-800ep": ("XXL", "800ep")}  # fmt: skip
"""a published model's name: its preset and recipe"""
GUIDES = {"guide-60k": ("B_GUIDE", "60k"), "guide-70k": ("B_GUIDE", "70k"), "guide-120k": ("B_GUIDE", "120k")}


class Checkpoint(NamedTuple):
    """A published network: its file on the hub, and its settings for a file that carries none."""

    path: str
    settings: dict


def checkpoint(preset: str, row: str) -> Checkpoint:
    """The network of a preset after a recipe's last step."""
    step = recipe(preset, row).max_steps
    settings = SFDConfig(model=PRESETS[preset], transport=TransportConfig())
    return Checkpoint(f"model_weights/{FOLDERS[preset]}/checkpoints/{step:07d}.pt", to_released(settings))


class Variant(NamedTuple):
    """A published model with the guide and the guidance that its figures were measured with (docs/METHOD.md 5)."""

    main: Checkpoint
    guide: Checkpoint
    guidance: GuidanceConfig


def published(name: str) -> Variant:
    """The published model of that name; ValueError lists the names."""
    if name not in VARIANTS:
        raise ValueError(f"unknown variant '{name}'; variants: {', '.join(VARIANTS)}")
    row = recipe(*VARIANTS[name])
    guidance = GuidanceConfig(mode="autoguidance", scale=row.guidance_scale)
    return Variant(checkpoint(*VARIANTS[name]), checkpoint(*row.guide.split()), guidance)
