"""The authors' repositories in small: files of the true names and layout with networks of a few thousand weights."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch

from harness.tiny_pipelines import STATISTICS, TINY, random_model
from sfd_fast.config import SFDConfig, TextureConfig
from sfd_fast.files.torch_file import write_torch_file
from sfd_fast.formats.released_model import write_released_dit
from sfd_fast.formats.released_weights import CODEC_FILE, CODEC_REPOSITORY, LATENTS, REPOSITORY
from sfd_fast.formats.texture import to_ldm
from sfd_fast.models.texture import TextureCodec

CODEC = TextureConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4)
NETWORK = replace(TINY, num_classes=1000)
GUIDE = replace(NETWORK, depth=1)
EMA_ONLY = "model_weights/sfd_xl/checkpoints/0400000.pt"
"""the one checkpoint that carries no settings"""


def write_repositories(root: Path) -> dict[str, Path]:
    """Both repositories below root: name -> folder."""
    models, codecs = root / "models", root / "codecs"
    networks = {
        "sfd_xl/checkpoints/4000000.pt": (NETWORK, 10),
        "sfd_xl/checkpoints/4000000_full.pt": (NETWORK, 10),
        "sfd_1p0/checkpoints/0400000.pt": (NETWORK, 12),
        "sfd_1p0/checkpoints/4000000.pt": (NETWORK, 13),
        "sfd_autoguidance_b/checkpoints/0060000.pt": (GUIDE, 14),
        "sfd_autoguidance_b/checkpoints/0070000.pt": (GUIDE, 15),
        "sfd_autoguidance_b/checkpoints/0120000.pt": (GUIDE, 16),
    }
    for path, (config, seed) in networks.items():
        state = random_model(config, seed).state_dict()
        write_released_dit(made(models / "model_weights" / path), SFDConfig(model=config), raw=state, average=state)
    write_torch_file(made(models / EMA_ONLY), {"ema": OrderedDict(random_model(NETWORK, 11).state_dict())})
    STATISTICS.save(made(models / LATENTS / "latents_stats.pt").parent)
    (models / LATENTS / "latents_rank00_shard000.safetensors").write_bytes(b"the cache, which nobody asked for")
    (models / "README.md").write_text("a model card\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = TextureCodec(CODEC)
    weights = to_ldm(codec.autoencoder.state_dict(), CODEC)
    write_torch_file(made(codecs / CODEC_FILE), {"state_dict": OrderedDict(weights)})
    return {REPOSITORY: models, CODEC_REPOSITORY: codecs}


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
