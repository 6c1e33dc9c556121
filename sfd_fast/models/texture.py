"""Texture codecs between pixels and latents: the KL autoencoder of the LDM family, and the identity for pixel space.

B batch, C latent channels, H and W pixels, s downsampling. Images are (B, 3, H, W) in [-1, 1].
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from sfd_fast.config import TextureConfig
from sfd_fast.formats.model_folder import read_directory, read_safetensors, require_finite
from sfd_fast.formats.released_file import read_torch_file, state_dict_of

LOGVAR_RANGE = (-30.0, 20.0)

# (LDM, diffusers) names of the layers inside a residual block and inside an attention.
RESIDUAL = (
    ("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"), ("nin_shortcut", "conv_shortcut"),
)  # fmt: skip
ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
SQUEEZED = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
"""1x1 convolutions of LDM that are Linears in diffusers"""


def parameter_names(config: TextureConfig) -> dict[str, str]:
    """LDM name -> diffusers name of every parameter that such an autoencoder may have.

    Decoder levels are counted from the other end: up.i is up_blocks.(levels - 1 - i). Source: METHOD 2.
    """
    lowest = len(config.channel_multipliers) - 1
    blocks, attentions, layers = {}, {}, {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for level in range(lowest + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{lowest - level}"
        for j in range(config.num_res_blocks + 1):  # the decoder has one more
            blocks[f"encoder.down.{level}.block.{j}"] = f"{down}.resnets.{j}"
            blocks[f"decoder.up.{level}.block.{j}"] = f"{up}.resnets.{j}"
            attentions[f"encoder.down.{level}.attn.{j}"] = f"{down}.attentions.{j}"
            attentions[f"decoder.up.{level}.attn.{j}"] = f"{up}.attentions.{j}"
        layers[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        layers[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    for side in ("encoder", "decoder"):
        blocks[f"{side}.mid.block_1"] = f"{side}.mid_block.resnets.0"
        blocks[f"{side}.mid.block_2"] = f"{side}.mid_block.resnets.1"
        attentions[f"{side}.mid.attn_1"] = f"{side}.mid_block.attentions.0"
        for ldm, diffusers in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            layers[f"{side}.{ldm}"] = f"{side}.{diffusers}"
    for groups, parts in ((blocks, RESIDUAL), (attentions, ATTENTION)):
        layers |= {f"{ldm}.{a}": f"{diffusers}.{b}" for ldm, diffusers in groups.items() for a, b in parts}
    return {f"{ldm}.{leaf}": f"{name}.{leaf}" for ldm, name in layers.items() for leaf in ("weight", "bias")}


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    for key in tensors:
        if key not in names:
            raise ValueError(f"parameter '{key}' belongs to no KL autoencoder of the LDM family")
    return {names[key]: value for key, value in tensors.items()}


def from_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LDM-named weights under diffusers' names; 1x1 convolutions of attention become Linears, losses are dropped."""
    tensors = {key: value for key, value in tensors.items() if "loss" not in key}
    renamed = _renamed(tensors, parameter_names(config_of_ldm(tensors)))
    return {key: value[:, :, 0, 0] if _is_convolution(key, value) else value for key, value in renamed.items()}


def _is_convolution(diffusers_key: str, value: Tensor) -> bool:
    return diffusers_key.endswith(SQUEEZED) and value.ndim == 4


def to_ldm(tensors: Mapping[str, Tensor], config: TextureConfig) -> dict[str, Tensor]:
    """The inverse of from_ldm: diffusers-named weights under LDM names."""
    widened = {key: value[:, :, None, None] if key.endswith(SQUEEZED) else value for key, value in tensors.items()}
    return _renamed(widened, {name: ldm for ldm, name in parameter_names(config).items()})


def config_of_ldm(tensors: Mapping[str, Tensor]) -> TextureConfig:
    """Architecture of LDM-named weights, read from their shapes.

    Raises ValueError where a part of an LDM autoencoder is missing.
    """
    for key in ("encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"):
        if key not in tensors:
            raise ValueError(f"these are not the weights of an LDM autoencoder: '{key}' is missing")
    channels = tensors["encoder.conv_in.weight"].shape[0]
    blocks = [re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.weight", key) for key in tensors]
    levels = sorted({int(match[1]) for match in blocks if match})
    widths = [tensors[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in levels]
    return TextureConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=1 + max(int(match[2]) for match in blocks if match),
        latent_channels=tensors["post_quant_conv.weight"].shape[1],
    )


class TextureCodec(nn.Module):
    """KL autoencoder (METHOD 2) as diffusers' AutoencoderKL with attention at the lowest level and in the middle."""

    def __init__(self, config: TextureConfig) -> None:
        super().__init__()
        from diffusers import AutoencoderKL  # heavy; only who decodes or encodes pixels needs it

        self.config = config
        num_plain = len(config.channel_multipliers) - 1
        self.autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * num_plain + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * num_plain,
            block_out_channels=tuple(config.channels * m for m in config.channel_multipliers),
            layers_per_block=config.num_res_blocks,
            latent_channels=config.latent_channels,
            norm_num_groups=32,
        )

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def downsampling(self) -> int:
        return self.config.downsampling

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
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} were given; the codec takes (B, {self.latent_channels}, h, w)"
            )
        return self.autoencoder.decode(latents).sample

    @classmethod
    def from_ldm(cls, tensors: Mapping[str, Tensor], source: object = "the file") -> "TextureCodec":
        """The autoencoder of LDM-named weights, in eval mode; its architecture is read from their shapes.

        Raises ValueError where something is missing, unexpected or of another shape.
        """
        renamed = from_ldm(tensors)
        with torch.device("meta"):
            codec = cls(config_of_ldm(tensors))
        expected = codec.autoencoder.state_dict()
        wrong = [key for key in expected if key not in renamed or renamed[key].shape != expected[key].shape]
        wrong += [key for key in renamed if key not in expected]
        if wrong:
            raise ValueError(
                f"the weights of {source} do not make an LDM autoencoder: {len(wrong)} are missing, unexpected or of "
                f"another shape, the first is '{wrong[0]}'"
            )
        codec.autoencoder.load_state_dict(renamed, assign=True)
        return codec.eval()

    def ldm_state_dict(self) -> dict[str, Tensor]:
        """Weights under the released (LDM) names."""
        return to_ldm(self.autoencoder.state_dict(), self.config)


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
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} were given; this pixel space takes "
                f"(B, {self.latent_channels}, H, W)"
            )
        return pixel_shuffle(latents, self.downsampling).expand(-1, 3, -1, -1).clone()


def to_uint8(images: Tensor) -> Tensor:
    """Pixels of images: (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, clamp(127.5 x + 128, 0, 255) truncated.

    Source: METHOD 2 (the released decoder's rounding).
    """
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def load_texture_codec(path: str | Path) -> TextureCodec | IdentityCodec:
    """The codec of our directory or of a released LDM file (.ckpt, .pt, .safetensors), on the CPU, in eval mode.

    Raises FileNotFoundError, or ValueError for damaged, diverged or foreign weights.
    """
    path = Path(path)
    if path.is_dir():
        stored = read_directory(path)
        if stored.kind == "identity":
            return IdentityCodec(**stored.content["config"])
        if stored.kind != "texture":
            raise ValueError(f"{path} holds a model of kind '{stored.kind}', not a texture codec")
        return TextureCodec.from_ldm(stored.tensors, path)
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)[0]
    else:
        tensors = state_dict_of(read_torch_file(path))
    require_finite(tensors, path)
    return TextureCodec.from_ldm(tensors, path)
