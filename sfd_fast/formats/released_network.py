"""The network of the released system, from its settings and the shapes of its weights, as our ModelConfig."""

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sfd_fast.config import ModelConfig
from sfd_fast.config.presets import RELEASED_NAMES

if TYPE_CHECKING:  # settings alone are read without torch
    from torch import Tensor

DINO = {"dinov2_vits14": 384, "dinov2_vitb14": 768, "dinov2_vitl14": 1024, "dinov2_vitg14": 1536}
VISION_CHANNELS = {
    **{f"{name}_reg": width for name, width in DINO.items()}, **DINO,
    "mae_base": 768, "mae_large": 1024, "clip_vit_base_patch16": 768, "clip_vit_large_patch14": 1024,
    "siglip_base_patch16_224": 768,
}  # fmt: skip
"""width of each vision model's patch tokens, under the released names (docs/METHOD.md 2)"""

SUPPORTED = {"use_swiglu": (True, False), "use_rmsnorm": (True, False), "learn_sigma": (False, False)}
"""switches of the network that have one value here: (that value, what a file without the switch means)"""

# The network of a file that lists none of its switches.
UNLISTED = {
    "use_shift": True, "use_qk_norm": False, "use_rope": False, "two_clocks": False, "semantic_channels": 0,
    "repa_channels": 0,
}  # fmt: skip

# Settings that `constructor_arguments` reads.
NETWORK_KEYS = {
    "model_type", "in_chans", "in_channels", "semantic_chans", "use_qknorm", "use_rope", "wo_shift", "use_repa",
    "repa_dino_version", "repa_feat_depth", "repa_depth", "repa_projector_dim", "class_dropout_prob", "input_size",
    "patch_size", "hidden_size", "depth", "num_heads", "num_classes", "image_size", "downsample_ratio",
}  # fmt: skip


def constructor_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a released configuration says about the network, under the names of the released constructor.

    Takes a YAML tree with sections (model, data, vae) or the constructor's arguments themselves.
    """
    if not isinstance(values.get("model"), Mapping):
        return dict(values)
    renamed = {"in_chans": "in_channels", "repa_feat_depth": "repa_depth"}
    arguments = {renamed.get(key, key): value for key, value in values["model"].items()}
    data, vae = values.get("data") or {}, values.get("vae") or {}
    if "num_classes" in data:
        arguments["num_classes"] = data["num_classes"]
    if "image_size" in data:
        arguments["input_size"] = data["image_size"] // vae.get("downsample_ratio", 16)
    return arguments


def model_config(arguments: Mapping[str, Any], weights: "Mapping[str, Tensor] | None" = None) -> ModelConfig:
    """The network's config from released constructor arguments and, where given, the shapes of its weights.

    Weights tell everything but the split of channels, the block that REPA reads and the label dropout; what both tell
    must agree. Without weights, unlisted switches are off as in the released system.
    Raises ValueError for a contradiction, something missing, or a network that this system does not build.
    """
    for name, (allowed, absent) in SUPPORTED.items():
        given = arguments.get(name, allowed if weights is not None else absent)
        if given != allowed:
            raise ValueError(f"released setting {name}: {given} is not supported; this network has {name}: {allowed}")
    said = _said(arguments, with_weights=weights is not None)
    shape = _said_by_weights(weights, said) if weights is not None else {}
    for key in said.keys() & shape.keys():
        if said[key] != shape[key]:
            raise ValueError(f"the configuration says {key} = {said[key]}, the weights have {shape[key]}")
    if weights is not None and arguments and not shape["two_clocks"]:
        said.setdefault("semantic_channels", 0)  # as everywhere in the released system, docs/METHOD.md 6
    values = {**(UNLISTED if weights is None else {}), **said, **shape}
    for key, option in (("channels", "in_channels"), ("semantic_channels", "semantic_chans")):
        if key not in values:
            raise ValueError(f"the network's {key} are unknown; pass config={{'{option}': ...}} or a released YAML")
    for key in ("hidden_size", "depth", "num_heads"):
        if key not in values:
            raise ValueError(f"the network's {key} is unknown; pass config={{'{key}': ...}} or a known model_type")
    values["texture_channels"] = values.pop("channels") - values["semantic_channels"]
    return ModelConfig(**values)


def _said(arguments: Mapping[str, Any], *, with_weights: bool) -> dict[str, Any]:
    """Fields of ModelConfig (and `channels`) that the arguments state."""
    said: dict[str, Any] = {}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    preset = RELEASED_NAMES.get(str(arguments.get("model_type", "")).removeprefix("LightningDiT-"))
    if preset is not None:
        said = {name: getattr(preset, name) for name in ("hidden_size", "depth", "num_heads", "patch_size")}
    same = {
        "input_size": "grid_size", "in_channels": "channels", "semantic_chans": "semantic_channels",
        "class_dropout_prob": "class_dropout", "use_qknorm": "use_qk_norm", "repa_projector_dim": "repa_hidden",
        **{key: key for key in ("patch_size", "hidden_size", "depth", "num_heads", "num_classes", "use_rope")},
    }  # fmt: skip
    said |= {ours: arguments[theirs] for theirs, ours in same.items() if theirs in arguments}
    if "wo_shift" in arguments:
        said["use_shift"] = not arguments["wo_shift"]
    if "semfirst_delta_t" in arguments:
        said["two_clocks"] = arguments["semfirst_delta_t"] > 0 and arguments.get("semantic_chans", 0) > 0
    if "use_repa" in arguments and not arguments["use_repa"]:
        said["repa_channels"] = 0
    elif arguments.get("use_repa") and not (with_weights and "repa_dino_version" not in arguments):
        said["repa_channels"] = vision_channels(arguments.get("repa_dino_version"))
    if arguments.get("repa_depth") and said.get("repa_channels") != 0:
        said["repa_depth"] = arguments["repa_depth"]
    return said


def _said_by_weights(weights: "Mapping[str, Tensor]", said: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig that the shapes of a state dict fix."""
    for key in ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"):
        if key not in weights:
            raise ValueError(f"these are not the weights of a LightningDiT: '{key}' is missing")
    if "blocks.0.mlp.w12.weight" not in weights or "blocks.0.norm1.weight" not in weights:
        raise ValueError("these weights have no SwiGLU or no RMSNorm weights; this network has both")
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    if blocks != {str(i) for i in range(len(blocks))}:
        raise ValueError(f"the weights have {len(blocks)} blocks, but they are not numbered from 0 on")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    side = math.isqrt(weights["pos_embed"].shape[1])
    labels = weights["y_embedder.embedding_table.weight"].shape[0]
    with_null = said.get("class_dropout") != 0 and said.get("num_classes") != labels
    shape: dict[str, Any] = {
        "hidden_size": width,
        "channels": channels,
        "patch_size": patch,
        "grid_size": side * patch,
        "depth": len(blocks),
        "num_classes": labels - with_null,
        "two_clocks": "t_embedder_sem.mlp.0.weight" in weights,
        "use_shift": weights["blocks.0.adaLN_modulation.1.weight"].shape[0] == 6 * width,
        "use_qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "use_rope": "feat_rope.freqs_cos" in weights,
        "repa_channels": 0,
    }
    if not with_null:
        shape["class_dropout"] = 0
    if shape["use_rope"]:
        shape["num_heads"] = width // weights["feat_rope.freqs_cos"].shape[1]
    elif shape["use_qk_norm"]:
        shape["num_heads"] = width // weights["blocks.0.attn.q_norm.weight"].shape[0]
    if "repa_projector.4.weight" in weights:
        shape["repa_channels"], shape["repa_hidden"] = weights["repa_projector.4.weight"].shape
    return shape


def vision_channels(name: object) -> int:
    """Width of the features of a vision model by its released name. ValueError names the nearest for a mistyped one."""
    if name in VISION_CHANNELS:
        return VISION_CHANNELS[name]
    near = difflib.get_close_matches(str(name), VISION_CHANNELS, n=1, cutoff=0.0)
    raise ValueError(
        f"released setting repa_dino_version: {name} is unknown, so the width of the REPA head is too; did you mean "
        f"{near[0]}? Known: {', '.join(VISION_CHANNELS)}"
    )
