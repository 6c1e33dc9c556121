"""Settings of the released system (YAML files or constructor arguments) as our dataclasses, and back."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from sfd_fast.files.home import with_home
from sfd_fast.files.yaml_text import read_yaml
from sfd_fast.formats.released_network import (
    NETWORK_KEYS,
    SUPPORTED,
    VISION_CHANNELS,
    constructor_arguments,
    model_config,
)

if TYPE_CHECKING:
    from torch import Tensor

SOLVERS = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun", "rk4": "rk4", "dopri5": "dopri5"}

# Settings that change what is computed and have one value here: name -> (value, what a file without it means).
FIXED = {
    ("transport", "path_type"): ("Linear", "Linear"),
    ("transport", "prediction"): ("velocity", "velocity"),
    ("transport", "loss_weight"): (None, None),
    ("sample", "mode"): ("ODE", "ODE"),
    ("sample", "reverse"): (False, False),
    ("sample", "likelihood"): (False, False),
}


@with_home
def read_settings(path: str | Path) -> dict:
    """A released YAML file. Raises FileNotFoundError, or ValueError where it is no mapping."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration {path} does not exist")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"configuration {path} holds a {type(values).__name__}, not keys with values")
    return values


class ReleasedConfig(NamedTuple):
    """A released configuration in our terms."""

    config: SFDConfig
    ignored: list[str]
    """settings that have no counterpart here, as section.key = value"""


def read_config(values: Mapping[str, Any], weights: "Mapping[str, Tensor] | None" = None) -> ReleasedConfig:
    """SFDConfig of a released YAML tree (or constructor arguments), with the network from the weights where given.

    Unlisted switches are off, other unlisted settings take the released trainer's defaults (docs/METHOD.md 6).
    Raises ValueError as `model_config`, and for settings that this system would compute otherwise.
    """
    tree = dict(values) if isinstance(values.get("model"), Mapping) else {"model": dict(values)}
    names = ("model", "data", "vae", "train", "optimizer", "transport", "sample")
    sections = {name: _Section(name, tree.get(name) or {}) for name in names}
    network = model_config(constructor_arguments(values), weights)
    sections["model"].taken |= set(SUPPORTED)  # model_config has read them
    for (name, key), (allowed, absent) in FIXED.items():
        given = sections[name].take(key, absent)
        if given != allowed:
            raise ValueError(f"released setting {name}.{key}: {given} is not supported; only {allowed} is")
    # 0.18215: docs/METHOD.md 2; settings of the network alone say nothing about the latents
    multiplier = 0.18215 if "model" in values else 1.0
    config = SFDConfig(
        model=network,
        transport=_transport(sections["model"], sections["transport"], network),
        optimizer=_optimizer(sections["optimizer"]),
        data=_data(sections["data"], multiplier=multiplier, normalise="data" not in values),
        train=_train(sections["train"], sections["model"]),
        run=_run(sections["train"], sections["data"], sections["sample"]),
        sampler=_sampler(sections["sample"]),
        guidance=_guidance(sections["sample"], sections["model"]),
    )
    return ReleasedConfig(config, _ignored(sections, tree, config))


def _ignored(sections: Mapping[str, "_Section"], tree: Mapping[str, Any], config: SFDConfig) -> list[str]:
    sections["sample"].taken |= {"class_label", "per_proc_batch_size", "balanced_sampling"}  # of `sfd sample`
    ignored = [
        f"{section.name}.{key} = {value}"
        for section in sections.values()
        for key, value in section.values.items()
        if key not in section.taken and key not in NETWORK_KEYS and value is not None
    ]
    ignored += [f"{key} = {value}" for key, value in tree.items() if key not in sections and value is not None]
    if config.guidance.mode == "cfg" and config.guidance.active and not config.model.semantic_channels:
        ignored.append("the first three channels alone under CFG, as LightningDiT's own sampler has it: all are guided")
    return ignored


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


def _data(section: _Section, *, multiplier: float, normalise: bool) -> DataConfig:
    return DataConfig(
        latent_multiplier=float(section.take("latent_multiplier", multiplier)),
        normalise_texture=section.take("latent_norm", normalise),
        normalise_semantic=section.take("latent_sv_norm", normalise),
        **section.fields(path="data_path", num_workers="num_workers", validation_path="valid_path"),
    )


def _train(train: _Section, model: _Section) -> TrainConfig:
    fields = train.fields(max_steps="max_steps", global_batch_size="global_batch_size", seed="global_seed")
    initial = [section.take(key, "") for section in (train, model) for key in ("weight_init", "load_ckpt")]
    fields["init_from"] = next(filter(None, initial), "")
    if model.take("use_checkpoint", False):
        fields["checkpoint_activations"] = 1.0
    return TrainConfig(**fields)


def _run(train: _Section, data: _Section, sample: _Section) -> RunConfig:
    fields = train.fields(log_every="log_every", checkpoint_every="ckpt_every")
    fields |= data.fields(eval_reference="fid_reference_file") | sample.fields(eval_images="fid_num")
    folder, name = train.take("output_dir", None), train.take("exp_name", None)
    if folder or name:
        fields["out"] = str(Path(folder or "", name or ""))
    return RunConfig(keep_checkpoints=0, **fields)  # the authors' trainer keeps them all


def _sampler(section: _Section) -> SamplerConfig:
    solver = section.take("sampling_method", "dopri5")
    if solver not in SOLVERS:
        raise ValueError(f"released setting sample.sampling_method: {solver} is unknown; known: {', '.join(SOLVERS)}")
    return SamplerConfig(
        solver=SOLVERS[solver],
        # the released number counts grid points
        num_inference_steps=max(int(section.take("num_sampling_steps", 250)) - 1, 1),
        grid="released",
        timestep_shift=float(section.take("timestep_shift", 0) or 1.0),  # 0 switches the released shift off
        **{key: float(value) for key, value in section.fields(atol="atol", rtol="rtol").items()},
    )


def _guidance(sample: _Section, model: _Section) -> GuidanceConfig:
    scale = max(float(sample.take("cfg_scale", 1.0)), 1.0)  # the authors' sampler skips guidance when w <= 1
    plain = "cfg" if scale > 1 else "none"
    return GuidanceConfig(
        mode="autoguidance" if sample.take("autoguidance", False) else plain,
        scale=scale,
        interval_start=float(sample.take("cfg_interval_start", 0.0)),
        interval_mode=model.take("semfirst_infer_interval_mode", "both"),
    )


def sample_settings(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of `sfd sample` from a released YAML tree, by their names there, and what has no counterpart.

    The model is ckpt_path, the guide that of autoguidance_config where that file is there.
    """
    config, ignored = read_config(tree)
    sample, guidance, sampler = tree.get("sample") or {}, config.guidance, config.sampler
    guide = sample.get("autoguidance_config")
    if guidance.mode == "autoguidance" and guide and Path(guide).is_file():
        guide = read_settings(guide).get("ckpt_path")
        ignored = [line for line in ignored if not line.startswith("sample.autoguidance_config")]
    else:
        guide = None
    label = sample.get("class_label")
    given = {
        "model": tree.get("ckpt_path"), "guide": guide, "num_images": sample.get("fid_num"),
        "labels": None if label is None else [label], "micro_batch_size": sample.get("per_proc_batch_size"),
        "seed": config.train.seed, "solver": sampler.solver,
        "num_inference_steps": sampler.num_inference_steps, "time_grid": sampler.grid,
        "timestep_shift": sampler.timestep_shift, "atol": sampler.atol, "rtol": sampler.rtol,
        "guidance_mode": guidance.mode, "guidance_scale": guidance.scale, "interval_start": guidance.interval_start,
        "interval_mode": guidance.interval_mode,
    }  # fmt: skip
    ignored = [line for line in ignored if not line.startswith("ckpt_path")]
    return {name: value for name, value in given.items() if value is not None}, ignored


def to_released(config: SFDConfig) -> dict[str, Any]:
    """The released YAML tree of one of our configurations; what the released system lacks is left out."""
    model, transport, sampler = config.model, config.transport, config.sampler
    name = next((n for n, p in RELEASED_NAMES.items() if _same_size(p, model)), f"custom/{model.patch_size}")
    vision = [name for name, channels in VISION_CHANNELS.items() if channels == model.repa_channels]
    solver = {ours: theirs for theirs, ours in SOLVERS.items()}.get(sampler.solver, "dopri5")
    return {
        "data": {
            "data_path": config.data.path, "image_size": 16 * model.grid_size, "num_classes": model.num_classes,
            "num_workers": config.data.num_workers,
            "latent_norm": config.data.normalise_texture, "latent_sv_norm": config.data.normalise_semantic,
            "latent_multiplier": config.data.latent_multiplier,
        } | ({"valid_path": config.data.validation_path} if config.data.validation_path else {}),
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
        } | ({"weight_init": config.train.init_from} if config.train.init_from else {}),
        # the released trainer clips whenever max_grad_norm is listed, to zero gradients if it is 0
        "optimizer": {"lr": config.optimizer.lr, "beta2": config.optimizer.beta2}
        | ({"max_grad_norm": config.optimizer.max_grad_norm} if config.optimizer.max_grad_norm else {}),
        "transport": {
            "path_type": "Linear", "prediction": "velocity", "loss_weight": None, "sample_eps": None, "train_eps": None,
            "use_cosine_loss": transport.cosine_loss, "use_lognorm": transport.time_distribution == "logit_normal",
        },
        "sample": {
            "mode": "ODE", "sampling_method": solver, "atol": sampler.atol, "rtol": sampler.rtol, "reverse": False,
            "likelihood": False, "num_sampling_steps": sampler.num_inference_steps + 1,
            "cfg_scale": config.guidance.scale, "cfg_interval_start": config.guidance.interval_start,
            "timestep_shift": 0 if sampler.timestep_shift == 1 else sampler.timestep_shift,
            "autoguidance": config.guidance.mode == "autoguidance",
        },
    }  # fmt: skip


def _same_size(preset: ModelConfig, model: ModelConfig) -> bool:
    size = {name: getattr(preset, name) for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    return replace(model, **size) == model
