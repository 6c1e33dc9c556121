"""Frozen vision foundation models: patch features of images, through transformers.

Letters: B images, H height, W width, N tokens (a square grid), F feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfd_fast.files.home import with_home
from sfd_fast.files.pretrained import load_pretrained, read_config

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

NAMES = {
    "dinov2-s": "facebook/dinov2-with-registers-small",  # F 384
    "dinov2-b": "facebook/dinov2-with-registers-base",  # F 768, the released choice
    "dinov2-l": "facebook/dinov2-with-registers-large",  # F 1024
    "dinov2-g": "facebook/dinov2-with-registers-giant",  # F 1536
    "mae-b": "facebook/vit-mae-base",  # F 768
    "mae-l": "facebook/vit-mae-large",  # F 1024
    "clip-b": "openai/clip-vit-base-patch16",  # F 768
    "clip-l": "openai/clip-vit-large-patch14",  # F 1024
    "siglip-b": "google/siglip-base-patch16-256",  # F 768
}
"""short names of hub ids"""


@dataclass(frozen=True)
class Family:
    """How one kind of encoder is built and read."""

    model: str
    """class of transformers"""
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]]
    """mean and standard deviation of the pixels it was trained on"""
    prefix: Callable[[Any], int]
    """tokens before the patches, from the model's config"""
    interpolates: bool = True
    """takes interpolate_pos_encoding for images of another size than its own; DINOv2 always interpolates"""


FAMILIES = {
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", IMAGENET, lambda c: 1 + c.num_register_tokens, interpolates=False
    ),
    "dinov2": Family("Dinov2Model", IMAGENET, lambda c: 1, interpolates=False),
    "vit_mae": Family("ViTMAEModel", IMAGENET, lambda c: 1),
    "clip": Family("CLIPVisionModel", OPENAI, lambda c: 1),
    "clip_vision_model": Family("CLIPVisionModel", OPENAI, lambda c: 1),
    "siglip": Family("SiglipVisionModel", HALF, lambda c: 0),
    "siglip_vision_model": Family("SiglipVisionModel", HALF, lambda c: 0),
}
"""by the model_type of their configuration"""


class VFM(nn.Module):
    """A frozen encoder. `features` are its last hidden state's patch tokens: the model's own, normalised where it does.

    DINOv2 and SigLIP end with a LayerNorm, CLIP's patch tokens do not, MAE runs unmasked and in order.
    """

    def __init__(self, model: nn.Module, family: Family, *, grid_size: int = 16):
        super().__init__()
        self.model, self.family = model.eval().requires_grad_(False), family
        self.grid_size = grid_size
        self.resolution = grid_size * model.config.patch_size
        mean, std = (torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in family.normalisation)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @property
    def width(self) -> int:
        """F, the features of a token."""
        return self.model.config.hidden_size

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalised with the encoder's mean and std, then bicubic (no antialias) to grid_size * patch_size.

        In this order, as released. images: uint8 (B, H, W, 3), or float (B, 3, H, W) in [0, 1].
        Returns (B, 3, R, R) float32. Raises ValueError for other layouts.
        """
        if images.dtype == torch.uint8 and images.dim() == 4 and images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2).float() / 255
        elif not (images.is_floating_point() and images.dim() == 4 and images.shape[1] == 3):
            raise ValueError(
                f"images {tuple(images.shape)}, {images.dtype}: give uint8 (B, H, W, 3) or float (B, 3, H, W) in [0, 1]"
            )
        images = (images.float() - self.mean) / self.std
        if tuple(images.shape[2:]) == (self.resolution, self.resolution):
            return images
        return F.interpolate(images, (self.resolution, self.resolution), mode="bicubic", align_corners=False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Patch features y*, (B, N, F), N = grid_size^2, row by row; images as in `preprocess`."""
        pixels = self.preprocess(images)
        options: dict[str, Any] = {}
        if self.family.interpolates and self.resolution != self.model.config.image_size:
            options["interpolate_pos_encoding"] = True
        if self.family.model == "ViTMAEModel":
            # rising noise keeps the patches in their order; the mask ratio is 0
            options["noise"] = torch.arange(self.grid_size**2, device=pixels.device).expand(len(pixels), -1).float()
        hidden = self.model(pixels, **options).last_hidden_state
        return hidden[:, self.family.prefix(self.model.config) :]


@with_home
def load_vfm(path_or_id: str | Path, *, grid_size: int = 16, setting: str = "--vfm") -> VFM:
    """An encoder from a local directory (no network attempt), a short name of NAMES, or a Hugging Face hub id.

    grid_size: tokens along each axis; images are resized to grid_size * patch size (16 * 14 = 224 for DINOv2).
    setting: what named the encoder, for messages.
    Nothing runs that the model brings along. Raises FileNotFoundError for a path that does not exist, ValueError for a
    model of another family and for one that is incomplete or damaged.
    """
    import transformers

    name = NAMES.get(str(path_or_id), str(path_or_id))
    local = Path(name).is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise FileNotFoundError(
            f"{name} is no directory; give a directory saved by transformers ({setting} FOLDER), a hub id "
            f"(organisation/name), or one of {', '.join(NAMES)}"
        )
    model_type = str(read_config(name, setting).get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        raise ValueError(f"{name} is a {model_type}; vision encoders supported: {', '.join(FAMILIES)}")
    options = {"mask_ratio": 0.0} if family.model == "ViTMAEModel" else {}
    kind = getattr(transformers, family.model)
    model = load_pretrained(kind, name, setting=setting, local_files_only=local, dtype=torch.float32, **options)
    return VFM(model, family, grid_size=grid_size)
