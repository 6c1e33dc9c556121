"""Texture codecs between pixels and latents: the KL autoencoder of the LDM family, one of diffusers, pixel space.

B batch, C latent channels, H and W pixels, s downsampling. Images are (B, 3, H, W) in [-1, 1].
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from sfd_fast.config import TextureConfig
from sfd_fast.diffusion.posterior import LOGVAR_RANGE
from sfd_fast.files.tensors import float32_by_default


class DiffusersCodec(nn.Module):
    """AutoencoderKL of diffusers. Its scaling factor is not used: latents are standardised."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.latent_channels = autoencoder.config.latent_channels
        self.downsampling = 2 ** (len(autoencoder.config.block_out_channels) - 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of the latent: images (B, 3, H, W) in [-1, 1] -> (mean, logvar), each (B, C, H / s, W / s)."""
        if images.ndim != 4 or images.shape[1] != 3 or any(n % self.downsampling for n in images.shape[2:]):
            raise ValueError(
                f"images of shape {tuple(images.shape)} were given; the codec takes (B, 3, H, W), H and W multiples of "
                f"{self.downsampling}"
            )
        posterior = self.autoencoder.encode(images).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents: (B, C, H / s, W / s) -> (B, 3, H, W), about [-1, 1]."""
        _check(latents, self.latent_channels)
        return self.autoencoder.decode(latents).sample


class TextureCodec(DiffusersCodec):
    """The LDM KL autoencoder (docs/METHOD.md 2): diffusers' with attention at the lowest level and in the middle."""

    @float32_by_default()
    def __init__(self, config: TextureConfig) -> None:
        from diffusers import AutoencoderKL  # heavy; only who decodes or encodes pixels needs it

        num_plain = len(config.channel_multipliers) - 1
        super().__init__(
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * num_plain + ("AttnDownEncoderBlock2D",),
                up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * num_plain,
                block_out_channels=tuple(config.channels * m for m in config.channel_multipliers),
                layers_per_block=config.num_res_blocks,
                latent_channels=config.latent_channels,
                norm_num_groups=32,
            )
        )
        self.config = config


class IdentityCodec(nn.Module):
    """Pixel space: the latent is the image itself, grey or in colour, its s x s squares folded into channels.

    latent_channels: s^2 for grey, 3 s^2 for colour.
    """

    def __init__(self, latent_channels: int = 3, downsampling: int = 1) -> None:
        super().__init__()
        if downsampling < 1 or latent_channels not in (downsampling**2, 3 * downsampling**2):
            raise ValueError(
                f"latent_channels {latent_channels} of pixel space with downsampling {downsampling} must be "
                f"{downsampling**2} (grey) or {3 * downsampling**2} (colour)"
            )
        self.latent_channels, self.downsampling = latent_channels, downsampling

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (mean, logvar), each (B, C, H/s, W/s); grey is the mean of the colours, logvar is -30."""
        if self.latent_channels == self.downsampling**2:
            images = images.mean(dim=1, keepdim=True)
        mean = pixel_unshuffle(images, self.downsampling).clone()
        return mean, torch.full_like(mean, LOGVAR_RANGE[0])

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H/s, W/s) -> (B, 3, H, W)."""
        _check(latents, self.latent_channels)
        return pixel_shuffle(latents, self.downsampling).expand(-1, 3, -1, -1).clone()


def _check(latents: Tensor, channels: int) -> None:
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} were given; this codec decodes (B, {channels}, H, W)"
        )


def to_uint8(images: Tensor) -> Tensor:
    """Pixels of images: (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, clamp(127.5 x + 128, 0, 255) truncated.

    Source: docs/METHOD.md 2 (the released decoder's rounding).
    """
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


Codec = DiffusersCodec | IdentityCodec
