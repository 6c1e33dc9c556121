"""Any KL autoencoder that diffusers saved, as a texture codec. B batch, C latent channels, s downsampling."""

import json
import os
import tempfile
from pathlib import Path

from torch import Tensor, nn

from sfd_fast.formats.model_folder import first_line, require_finite
from sfd_fast.models.texture import IdentityCodec, TextureCodec, load_texture_codec


class DiffusersCodec(nn.Module):
    """AutoencoderKL behind the interface of TextureCodec. Its scaling factor is not used: latents are standardised."""

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder
        self.latent_channels = autoencoder.config.latent_channels
        self.downsampling = 2 ** (len(autoencoder.config.block_out_channels) - 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior: images (B, 3, H, W) in [-1, 1] -> (mean, logvar), each (B, C, H / s, W / s)."""
        posterior = self.autoencoder.encode(images).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents: (B, C, H / s, W / s) -> (B, 3, H, W), about [-1, 1]."""
        return self.autoencoder.decode(latents).sample


def is_diffusers_directory(path: str | Path) -> bool:
    """Whether diffusers saved an AutoencoderKL there."""
    config = Path(path, "config.json")
    return config.is_file() and json.loads(config.read_text()).get("_class_name") == "AutoencoderKL"


def load_codec(path: str | Path) -> "DiffusersCodec | TextureCodec | IdentityCodec":
    """The texture codec of a directory saved by diffusers, of our directory, or of a released LDM file; frozen.

    No network attempt. Raises FileNotFoundError for a missing path, ValueError for foreign or damaged weights.
    """
    codec = load_autoencoder(path) if is_diffusers_directory(path) else load_texture_codec(path)
    return codec.eval().requires_grad_(False)


def load_autoencoder(folder: str | Path) -> DiffusersCodec:
    from diffusers import AutoencoderKL

    try:
        model, loaded = AutoencoderKL.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise ValueError(
            f"{folder} is a directory of diffusers, but its AutoencoderKL cannot be loaded: {first_line(error)}"
        ) from error
    missing = loaded["missing_keys"]
    if missing:  # diffusers would leave them at random values
        raise ValueError(f"{folder} lacks {len(missing)} weights of its AutoencoderKL, the first is '{missing[0]}'")
    require_finite(model.state_dict(), folder)
    return DiffusersCodec(model)


def save_autoencoder(folder: Path, codec: DiffusersCodec) -> None:
    """Writes a directory that diffusers and load_codec read; each file appears under its name when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
        codec.autoencoder.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir(), reverse=True):  # config.json, which names the kind, last
            os.replace(path, folder / path.name)
