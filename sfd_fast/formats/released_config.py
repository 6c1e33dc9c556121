"""Settings of the released system (YAML files, constructor arguments, weight shapes) as our dataclasses, and back."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sfd_fast.config import (
    DataConfig,
    GuidanceConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    SFDConfig,
    TrainConfig,
    TransportConfig,
)
from sfd_fast.config.presets import RELEASED_NAMES
from sfd_fast.files.yaml_text import read_yaml

# Width of each vision model's patch tokens, under the released names (docs/METHOD.md 2).
VISION_CHANNELS = {
    "dinov2_vits14_reg": 384, "dinov2_vitb14_reg": 768, "dinov2_vitl14_reg": 1024, "dinov2_vitg14_reg": 1536,
    "mae_base": 768, "mae_large": 1024, "clip_vit_base_patch16": 768, "clip_vit_large_patch14": 1024,
    "siglip_base_patch16_224": 768,
}  # fmt: skip

SOLVERS = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun", "rk4": "rk4", "dopri5": "dopri5"}

# Settings that change what is computed and have one value here: name -> (value, what a file without it means).
FIXED = {
    ("model", "use_swiglu"): (True, False),
    ("model", "use_rmsnorm"): (True, False),
    ("model", "learn_sigma"): (False, False),
    ("transport", "path_type"): ("Linear", "Linear"),
    ("transport", "prediction"): ("velocity", "velocity"),
    ("transport", "loss_weight"): (None, None),
    ("data", "latent_norm"): (True, True),
    ("data", "latent_sv_norm"): (True, True),
    ("sample", "mode"): ("ODE", "ODE"),
    ("sample", "reverse"): (False, False),
    ("sample", "likelihood"): (False, False),
}

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


def read_settings(path: str | Path) -> dict:
    """A released YAML file. Raises FileNotFoundError, or ValueError where it is no mapping."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration {path} does not exist")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"configuration {path} holds a {type(values).__name__}, not keys with values")
    return values


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


def model_config(arguments: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> ModelConfig:
    """The network's config from released constructor arguments and, where given, the shapes of its weights.

    Weights tell everything but the split of channels, the block that REPA reads and the label dropout; what both tell
    must agree. Without weights, unlisted switches are off as in the released system.
    Raises ValueError for a contradiction, something missing, or a network that this system does not build.
    """
    for name, allowed in (("use_swiglu", True), ("use_rmsnorm", True), ("learn_sigma", False)):
        given = arguments.get(name, allowed if weights is not None else FIXED["model", name][1])
        if given != allowed:
            raise ValueError(f"released setting {name}: {given} is not supported; this network has {name}: {allowed}")
    said = _said(arguments)
    shape = _said_by_weights(weights, said) if weights is not None else {}
    for key in said.keys() & shape.keys():
        if said[key] != shape[key]:
            raise ValueError(f"the configuration says {key} = {said[key]}, the weights have {shape[key]}")
    values = {**(UNLISTED if weights is None else {}), **said, **shape}
    for key, option in (("channels", "in_channels"), ("semantic_channels", "semantic_chans")):
        if key not in values:
            raise ValueError(f"the network's {key} are unknown; pass config={{'{option}': ...}} or a released YAML")
    for key in ("hidden_size", "depth", "num_heads"):
        if key not in values:
            raise ValueError(f"the network's {key} is unknown; pass config={{'{key}': ...}} or a known model_type")
    values["texture_channels"] = values.pop("channels") - values["semantic_channels"]
    return ModelConfig(**values)


def _said(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig (and `channels`) that the arguments state."""
    said: dict[str, Any] = {}
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
    elif arguments.get("use_repa") and arguments.get("repa_dino_version") in VISION_CHANNELS:
        said["repa_channels"] = VISION_CHANNELS[arguments["repa_dino_version"]]
    if arguments.get("repa_depth") and said.get("repa_channels") != 0:
        said["repa_depth"] = arguments["repa_depth"]
    return said


def _said_by_weights(weights: Mapping[str, Tensor], said: Mapping[str, Any]) -> dict[str, Any]:
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


class ReleasedConfig(NamedTuple):
    """A released configuration in our terms."""

    config: SFDConfig
    ignored: list[str]
    """settings that have no counterpart here, as section.key = value"""


def read_config(values: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> ReleasedConfig:
    """SFDConfig of a released YAML tree (or constructor arguments), with the network from the weights where given.

    Unlisted switches are off, other unlisted settings take the released trainer's defaults (docs/METHOD.md 6).
    Raises ValueError as `model_config`, and for settings that this system would compute otherwise.
    """
    tree = dict(values) if isinstance(values.get("model"), Mapping) else {"model": dict(values)}
    names = ("model", "data", "vae", "train", "optimizer", "transport", "sample")
    sections = {name: _Section(name, tree.get(name) or {}) for name in names}
    network = model_config(constructor_arguments(values), weights)
    for (name, key), (allowed, absent) in FIXED.items():
        if weights is not None and key in ("use_swiglu", "use_rmsnorm"):
            absent = allowed
        given = sections[name].take(key, absent)
        if given != allowed:
            raise ValueError(f"released setting {name}.{key}: {given} is not supported; only {allowed} is")
    config = SFDConfig(
        model=network,
        transport=_transport(sections["model"], sections["transport"], network),
        optimizer=_optimizer(sections["optimizer"]),
        # 0.18215 where a configuration leaves it out (docs/METHOD.md 2); constructor arguments say nothing about the
        # latents, and the released configurations have 1.0
        data=_data(sections["data"], 0.18215 if "model" in values else 1.0),
        train=TrainConfig(
            **sections["train"].fields(max_steps="max_steps", global_batch_size="global_batch_size", seed="global_seed")
        ),
        run=_run(sections["train"]),
        sampler=_sampler(sections["sample"]),
        guidance=_guidance(sections["sample"], sections["model"]),
    )
    ignored = [
        f"{section.name}.{key} = {value}"
        for section in sections.values()
        for key, value in section.values.items()
        if key not in section.taken and key not in NETWORK_KEYS and value is not None
    ]
    ignored += [f"{key} = {value}" for key, value in tree.items() if key not in sections and value is not None]
    return ReleasedConfig(config, ignored)


class _Section:
    """One section of a released YAML, remembering which keys were read."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name, self.values, self.taken = name, values, set()

    def take(self, key: str, absent: Any) -> Any:
        self.taken.add(key)
        value = self.values.get(key)
        return absent if value is None else value

    def fields(self, **names: str) -> dict[str, Any]:
        """{our field: value} of the listed keys that are present."""
        found = {ours: self.take(theirs, None) for ours, theirs in names.items()}
        return {ours: value for ours, value in found.items() if value is not None}


def _transport(model: _Section, transport: _Section, network: ModelConfig) -> TransportConfig:
    delta_t = model.take("semfirst_delta_t", 0.0)
    if network.two_clocks and delta_t == 0:
        raise ValueError("the network has two clocks, but semfirst_delta_t is not given; pass it in the configuration")
    return TransportConfig(
        delta_t=float(delta_t) if network.two_clocks else 0.0,
        time_distribution="logit_normal" if transport.take("use_lognorm", False) else "uniform",
        semantic_weight=float(model.take("semantic_weight", 1.0)),
        cosine_loss=bool(transport.take("use_cosine_loss", False)),
        repa_weight=float(model.take("repa_weight", 1.0)) if network.repa_channels else 0.0,
        repa_mode=model.take("repa_mode", "cos"),
    )


def _optimizer(section: _Section) -> OptimizerConfig:
    return OptimizerConfig(**section.fields(lr="lr", beta2="beta2", max_grad_norm="max_grad_norm"))


def _data(section: _Section, absent_multiplier: float) -> DataConfig:
    multiplier = float(section.take("latent_multiplier", absent_multiplier))
    return DataConfig(latent_multiplier=multiplier, **section.fields(path="data_path", num_workers="num_workers"))


def _run(section: _Section) -> RunConfig:
    fields = section.fields(log_every="log_every", checkpoint_every="ckpt_every")
    folder, name = section.take("output_dir", None), section.take("exp_name", None)
    if folder or name:
        fields["out"] = str(Path(folder or "", name or ""))
    return RunConfig(**fields)


def _sampler(section: _Section) -> SamplerConfig:
    solver = section.take("sampling_method", "dopri5")
    if solver not in SOLVERS:
        raise ValueError(f"released setting sample.sampling_method: {solver} is unknown; known: {', '.join(SOLVERS)}")
    return SamplerConfig(
        solver=SOLVERS[solver],
        num_steps=max(int(section.take("num_sampling_steps", 250)) - 1, 1),  # the released number counts grid points
        grid="released",
        timestep_shift=float(section.take("timestep_shift", 0) or 1.0),  # 0 switches the released shift off
        **{key: float(value) for key, value in section.fields(atol="atol", rtol="rtol").items()},
    )


def _guidance(sample: _Section, model: _Section) -> GuidanceConfig:
    scale = float(sample.take("cfg_scale", 1.0))
    autoguidance = bool(sample.take("autoguidance", False))
    plain = "cfg" if scale > 1 else "none"  # the released sampler skips guidance when w <= 1
    return GuidanceConfig(
        mode="autoguidance" if autoguidance else plain,
        scale=scale if autoguidance or scale > 1 else 1.0,
        interval_start=float(sample.take("cfg_interval_start", 0.0)),
        interval_mode=model.take("semfirst_infer_interval_mode", "both"),
    )


def to_released(config: SFDConfig) -> dict[str, Any]:
    """The released YAML tree of one of our configurations; what the released system lacks is left out."""
    model, transport, sampler = config.model, config.transport, config.sampler
    name = next((n for n, p in RELEASED_NAMES.items() if _same_size(p, model)), f"custom/{model.patch_size}")
    vision = [name for name, channels in VISION_CHANNELS.items() if channels == model.repa_channels]
    solver = {ours: theirs for theirs, ours in SOLVERS.items()}.get(sampler.solver, "dopri5")
    return {
        "data": {
            "data_path": config.data.path, "image_size": 16 * model.grid_size, "num_classes": model.num_classes,
            "num_workers": config.data.num_workers, "latent_norm": True, "latent_sv_norm": True,
            "latent_multiplier": config.data.latent_multiplier,
        },
        "vae": {"model_name": "sdvae_f16d32", "downsample_ratio": 16},
        "model": {
            "model_type": f"LightningDiT-{name}", "use_qknorm": model.use_qk_norm, "use_swiglu": True,
            "use_rope": model.use_rope, "use_rmsnorm": True, "wo_shift": not model.use_shift,
            "in_chans": model.channels, "semantic_chans": model.semantic_channels,
            "semfirst_delta_t": transport.delta_t, "semantic_weight": transport.semantic_weight,
            "use_repa": model.repa_channels > 0, "repa_dino_version": (vision or [None])[0],
            "repa_feat_depth": model.repa_depth, "repa_weight": transport.repa_weight,
            "repa_mode": transport.repa_mode, "class_dropout_prob": model.class_dropout,
            "semfirst_infer_interval_mode": config.guidance.interval_mode,
        },
        "train": {
            "max_steps": config.train.max_steps, "global_batch_size": config.train.global_batch_size,
            "global_seed": config.train.seed, "output_dir": str(Path(config.run.out).parent),
            "exp_name": Path(config.run.out).name, "log_every": config.run.log_every,
            "ckpt_every": config.run.checkpoint_every,
        },
        # the released trainer clips whenever max_grad_norm is listed, to zero gradients if it is 0
        "optimizer": {"lr": config.optimizer.lr, "beta2": config.optimizer.beta2}
        | ({"max_grad_norm": config.optimizer.max_grad_norm} if config.optimizer.max_grad_norm else {}),
        "transport": {
            "path_type": "Linear", "prediction": "velocity", "loss_weight": None, "sample_eps": None, "train_eps": None,
            "use_cosine_loss": transport.cosine_loss, "use_lognorm": transport.time_distribution == "logit_normal",
        },
        "sample": {
            "mode": "ODE", "sampling_method": solver, "atol": sampler.atol, "rtol": sampler.rtol, "reverse": False,
            "likelihood": False, "num_sampling_steps": sampler.num_steps + 1,
            "cfg_scale": config.guidance.scale, "cfg_interval_start": config.guidance.interval_start,
            "timestep_shift": 0 if sampler.timestep_shift == 1 else sampler.timestep_shift,
            "autoguidance": config.guidance.mode == "autoguidance",
        },
    }  # fmt: skip


def _same_size(preset: ModelConfig, model: ModelConfig) -> bool:
    size = {name: getattr(preset, name) for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    return replace(model, **size) == model
