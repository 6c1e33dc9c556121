"""Texture codecs as files: our folders, folders of diffusers, and LDM checkpoints with their own parameter names.

LDM's autoencoder has the parameters of diffusers' AutoencoderKL with attention at the lowest level (docs/METHOD.md 2).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd_fast.config import TextureConfig, to_dict
from sfd_fast.files.documents import read_json
from sfd_fast.files.home import with_home
from sfd_fast.files.messages import naming
from sfd_fast.files.pretrained import load_pretrained
from sfd_fast.files.tensors import check_fit, float32_by_default, read_safetensors, require_finite
from sfd_fast.files.torch_file import read_torch_file
from sfd_fast.formats.marked_folder import MARK, check_files, replace_marked
from sfd_fast.formats.model_folder import read_directory, write_directory
from sfd_fast.formats.released_file import state_dict_of, without_wrappers
from sfd_fast.models.texture import Codec, DiffusersCodec, IdentityCodec, TextureCodec

# (LDM, diffusers) names of the layers inside a residual block and inside an attention.
RESIDUAL = (
    ("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"), ("nin_shortcut", "conv_shortcut"),
)  # fmt: skip
ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
SQUEEZED = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
"""1x1 convolutions of LDM that are Linears in diffusers"""


def parameter_names(config: TextureConfig) -> dict[str, str]:
    """LDM name -> diffusers name of every parameter that such an autoencoder may have.

    Decoder levels are counted from the other end: up.i is up_blocks.(levels - 1 - i). Source: docs/METHOD.md 2.
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


def without_losses(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights less those of the training loss (a discriminator), which LDM files hold too."""
    return {key: value for key, value in tensors.items() if "loss" not in key}


def from_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LDM-named weights under diffusers' names; 1x1 convolutions of attention become Linears, losses are dropped."""
    tensors = without_losses(tensors)
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
    num_res_blocks = 1 + max(int(match[2]) for match in blocks if match)
    if num_res_blocks > len(tensors):
        raise ValueError(f"these weights name a block {num_res_blocks - 1}, but there are only {len(tensors)} of them")
    return TextureConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=num_res_blocks,
        latent_channels=tensors["post_quant_conv.weight"].shape[1],
    )


def texture_codec_from_ldm(tensors: Mapping[str, Tensor], source: object = "the file") -> TextureCodec:
    """The autoencoder of LDM-named weights, in eval mode; its architecture is read from their shapes.

    Raises ValueError where something is missing, unexpected or of another shape.
    """
    with naming(source):
        config, renamed = config_of_ldm(tensors), from_ldm(tensors)
        with torch.device("meta"), float32_by_default():
            codec = TextureCodec(config)
        check_fit(codec.autoencoder.state_dict(), renamed, f"the weights of {source}")
        codec.autoencoder.load_state_dict(renamed, assign=True)
    return codec.eval()


@with_home
def save_codec(
    path: str | Path, codec: Codec, rest: tuple[dict[str, Tensor], dict[str, Any]] | None = None
) -> None:
    """Writes a texture codec's directory: the autoencoder's weights under the released (LDM) names, one of diffusers as
    diffusers does. Raises as `write_directory`, which tells of `rest` too.
    """
    if isinstance(codec, IdentityCodec):
        settings = {"latent_channels": codec.latent_channels, "downsampling": codec.downsampling}
        write_directory(path, "identity", {}, {"config": settings})
    elif isinstance(codec, TextureCodec):
        weights = to_ldm(codec.autoencoder.state_dict(), codec.config)
        write_directory(path, "texture", weights, {"config": to_dict(codec.config)}, rest)
    else:
        replace_marked(path, "diffusers", codec.autoencoder.save_pretrained)


PIXELS = re.compile(r"(?:pixels|identity)(?::([1-9]\d?))?")
"""the names of pixel space, with the edge of the squares that are folded into channels"""


@with_home
def load_codec(path: str | Path) -> Codec:
    """The texture codec of a directory saved by diffusers, of our directory, or of a released LDM file (.ckpt, .pt,
    .safetensors), or pixel space (pixels, pixels:2); frozen, on the CPU.

    No network attempt. Raises FileNotFoundError, or ValueError for damaged, diverged or foreign weights.
    """
    pixels = PIXELS.fullmatch(str(path))
    path = Path(path)
    if pixels and not path.exists():
        side = int(pixels[1] or 1)
        return IdentityCodec(3 * side**2, side).eval()
    with naming(path):
        if folder := diffusers_directory(path):
            codec = load_autoencoder(folder)
        elif path.is_dir():
            codec = codec_of_directory(path)
        else:
            safe = path.suffix == ".safetensors"
            tensors = without_wrappers(read_safetensors(path)[0]) if safe else state_dict_of(read_torch_file(path))
            require_finite(tensors, path)
            codec = texture_codec_from_ldm(tensors, path)
    return codec.eval().requires_grad_(False)


def codec_of_directory(path: Path) -> Codec:
    stored = read_directory(path)
    if stored.kind == "identity":
        return IdentityCodec(**stored.content["config"])
    if stored.kind != "texture":
        raise ValueError(f"{path} holds a model of kind '{stored.kind}', not a texture codec")
    return texture_codec_from_ldm(stored.tensors, path)


def diffusers_directory(path: Path) -> Path | None:
    """Where diffusers saved an AutoencoderKL: path itself, or `vae` in a pipeline's folder; None where it did not.

    Raises ValueError for another class of diffusers.
    """
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            kind = read_json(folder / "config.json").get("_class_name")
            if kind == "AutoencoderKL":
                return folder
            if kind is not None:
                raise ValueError(f"{folder} holds a {kind} of diffusers; the texture codec must be an AutoencoderKL")
    return None


def load_autoencoder(folder: Path) -> DiffusersCodec:
    from diffusers import AutoencoderKL

    if (folder / MARK).is_file():
        check_files(folder)
    return DiffusersCodec(load_pretrained(AutoencoderKL, folder, local_files_only=True, low_cpu_mem_usage=False))
