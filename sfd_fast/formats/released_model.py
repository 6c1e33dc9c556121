"""Models from and to files: our directories (safetensors that carry their config) and the released formats.

    save_model / load_model / load_semvae / save_codec   our directories, see directory.py
    load_released                                        a released checkpoint as a ready network
    convert_released / export_released                   one into the other, without loss in either direction
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from sfd_fast.config import ModelConfig, SemVAEConfig, SFDConfig, from_dict, to_dict
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.formats.model_folder import (
    WEIGHTS,
    read_description,
    read_directory,
    read_safetensors,
    require_finite,
    write_directory,
    write_safetensors,
)
from sfd_fast.formats.released_config import constructor_arguments, model_config, read_yaml, to_released
from sfd_fast.formats.released_config import read_config as read_released_config
from sfd_fast.formats.released_file import (
    PickledConfig,
    pack_tree,
    read_torch_file,
    state_dict_of,
    unpack_tree,
    write_torch_file,
)
from sfd_fast.formats.released_semvae import semvae_config, semvae_to_released
from sfd_fast.models.diffusers_codec import DiffusersCodec, save_autoencoder
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.semvae import SemVAE
from sfd_fast.models.texture import IdentityCodec, TextureCodec

REST = "released.safetensors"
"""what a released file held beside the weights (raw weights, optimizer, settings): kept for the way back"""

ReleasedSettings = Mapping[str, Any] | str | Path
"""a released YAML (path or tree), or the released constructor's arguments"""


def save_model(
    path: str | Path,
    model: LightningDiT | SemVAE,
    *,
    config: SFDConfig | None = None,
    statistics: LatentStatistics | None = None,
    weights: Mapping[str, Tensor] | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model's directory, atomically.

    config: of the run that trained a LightningDiT (delta_t is part of it); statistics: of the latents it saw; weights:
    stored instead of the model's own (an EMA); card: anything JSON for the record (step, data, metrics).
    Raises ValueError where these do not belong to the model, OSError where the place cannot be written.
    """
    kind = "dit" if isinstance(model, LightningDiT) else "semvae"
    if config is not None and kind == "dit" and config.model != model.config:
        raise ValueError("config.model is not the config of the model that is being saved")
    tensors = dict(model.state_dict())
    if weights is not None:
        check_fit(model, weights, "the given weights")
        tensors = {name: weights[name] for name in tensors}
    settings = to_dict(model.config)
    if kind == "dit":
        settings = {"model": settings} if config is None else to_dict(config)
    content: dict[str, Any] = {"config": settings, "card": dict(card or {})}
    if statistics is not None:
        content["statistics"] = _statistics_as_json(statistics)
    Path(path, REST).unlink(missing_ok=True)  # it described the weights that are being replaced
    write_directory(path, kind, tensors, content)


def save_codec(path: str | Path, codec: TextureCodec | IdentityCodec | DiffusersCodec) -> None:
    """Writes a texture codec's directory: the autoencoder's weights under the released (LDM) names, one of diffusers as
    diffusers does. Raises OSError where the place cannot be written.
    """
    Path(path, REST).unlink(missing_ok=True)
    if isinstance(codec, DiffusersCodec):
        save_autoencoder(Path(path), codec)
    elif isinstance(codec, IdentityCodec):
        settings = {"latent_channels": codec.latent_channels, "downsampling": codec.downsampling}
        write_directory(path, "identity", {}, {"config": settings})
    else:
        write_directory(path, "texture", codec.ldm_state_dict(), {"config": to_dict(codec.config)})


def load_model(path: str | Path, **runtime: Any) -> LightningDiT:
    """The network of a directory that `save_model` wrote (or of a released file), on the CPU, in eval mode.

    runtime: residual, attention_backend, checkpoint_activations of LightningDiT.
    Raises FileNotFoundError, or ValueError for damaged, diverged or foreign weights.
    """
    if Path(path).is_file():
        return load_released(path)
    stored = read_directory(path, "dit")
    return _dit(from_dict(ModelConfig, stored.content["config"]["model"]), stored.tensors, path, **runtime)


def load_semvae(path: str | Path, config: ReleasedSettings | None = None) -> SemVAE:
    """The SemVAE of our directory or of a released file (.pt, .safetensors), on the CPU, in eval mode.

    config: settings for a file that does not carry them, for example {"num_heads": 6}.
    Raises as `load_model`.
    """
    if Path(path).is_dir():
        stored = read_directory(path, "semvae")
        return _semvae(from_dict(SemVAEConfig, stored.content["config"]), stored.tensors, path)
    released = _read_released(path, config)
    return _semvae(semvae_config(released.weights, released.settings), released.weights, path)


def read_config(path: str | Path) -> SFDConfig:
    """Config of the run that trained the LightningDiT of a directory. ValueError where it was saved without one."""
    settings = read_description(path, "dit")[1]["config"]
    if set(settings) == {"model"}:
        raise ValueError(f"{path} was saved with its network's config only; save_model(..., config=...) keeps it all")
    return from_dict(SFDConfig, _lists_as_tuples(settings))


def read_statistics(path: str | Path) -> LatentStatistics | None:
    """Statistics of the latents that the LightningDiT of a directory was trained on, if they were saved."""
    values = read_description(path, "dit")[1].get("statistics")
    if values is None:
        return None
    return LatentStatistics(**{name: torch.tensor(v) if isinstance(v, list) else v for name, v in values.items()})


def read_card(path: str | Path) -> dict[str, Any]:
    """What `save_model` was given for the record."""
    return read_description(path)[1].get("card", {})


def load_released(
    path: str | Path, config: ReleasedSettings | None = None, *, weights: str = "ema"
) -> LightningDiT:
    """A ready network, on the CPU and in eval mode, from a released .pt or from .safetensors under the released names.

    config: released YAML (path or tree) or the released constructor's arguments, where the file carries none (they win
    over those it carries). weights: "ema" or "model". No pickled code runs.
    Raises FileNotFoundError; ValueError for truncated, refused, diverged or foreign files and contradictory settings.
    """
    released = _read_released(path, config, weights)
    return _dit(model_config(constructor_arguments(released.settings), released.weights), released.weights, path)


class Converted(NamedTuple):
    """What `convert_released` made."""

    kind: str
    """dit, semvae or texture"""
    ignored: list[str]
    """released settings without a counterpart here (they are kept for the way back)"""


def convert_released(
    source: str | Path,
    target: str | Path,
    *,
    config: ReleasedSettings | None = None,
    weights: str = "ema",
    keep_training_state: bool = True,
) -> Converted:
    """Turns a released file (diffusion transformer, SemVAE, LDM autoencoder) into one of our directories.

    keep_training_state: store what the file holds beside the weights too, so that `export_released` gives back the same
    keys, order, dtypes, tensors and config; without it only weights and settings are kept.
    Raises as `load_released`.
    """
    released = _read_released(source, config, weights)
    ignored: list[str] = []
    if "x_embedder.proj.weight" in released.weights:
        kind, (settings, ignored) = "dit", read_released_config(released.settings, released.weights)
        model = _dit(settings.model, released.weights, source)
        save_model(target, model, config=settings, card={"source": Path(source).name, "weights": weights})
    elif "quant_conv.weight" in released.weights:
        kind, codec = "texture", TextureCodec.from_ldm(released.weights)
        save_codec(target, codec)
    else:
        kind = "semvae"
        model = _semvae(semvae_config(released.weights, released.settings), released.weights, source)
        save_model(target, model, card={"source": Path(source).name})
    if released.tree is not None:
        tree = released.tree if keep_training_state else _without_training_state(released.tree, weights)
        stored = set(read_safetensors(Path(target, WEIGHTS))[0])
        known = {name: tensor for name, tensor in released.weights.items() if name in stored}
        text, tensors = pack_tree(tree, known)
        write_safetensors(Path(target, REST), tensors, {"tree": text})
    return Converted(kind, ignored)


def export_released(source: str | Path, target: str | Path) -> None:
    """Writes a directory as a file that the released code loads: identical to the one it was converted from, or for a
    model of our own with the released keys and settings (EMA and raw weights the same, no optimizer state).

    Raises FileNotFoundError, ValueError (damaged directory, config not stored), OSError.
    """
    stored = read_directory(source)
    if Path(source, REST).is_file():
        tensors, description = read_safetensors(Path(source, REST))
        write_torch_file(target, unpack_tree(description["tree"], tensors, stored.tensors))
        return
    if stored.kind == "dit":
        model = load_model(source)
        write_released_dit(target, read_config(source), raw=model.state_dict(), average=model.state_dict())
    elif stored.kind == "semvae":
        model = load_semvae(source)
        write_torch_file(target, {
            "iteration": int(stored.content.get("card", {}).get("step", 0)),
            "model_state_dict": OrderedDict(model.state_dict()),
            "optimizer_state_dict": {},
            "config": yaml.safe_dump(semvae_to_released(model.config), sort_keys=False),
            "input_dim": model.config.feature_channels,
            "bottleneck_dim": model.config.latent_channels,
        })  # fmt: skip
    elif stored.kind == "texture":
        write_torch_file(target, {"state_dict": OrderedDict(stored.tensors)})
    else:
        raise ValueError(f"{source} holds a '{stored.kind}' codec, which has no released format")


def write_released_dit(
    target: str | Path, config: SFDConfig, *, raw: Mapping[str, Tensor], average: Mapping[str, Tensor]
) -> None:
    """A LightningDiT as a file that the released code loads: raw weights as "model", their average as "ema"."""
    settings = PickledConfig(to_released(config))
    tree = {"model": OrderedDict(raw), "ema": OrderedDict(average), "opt": {}, "config": settings}
    write_torch_file(target, tree)


class _Released(NamedTuple):
    weights: dict[str, Tensor]
    settings: Mapping[str, Any]
    tree: Any
    """all of a torch file; None for safetensors"""


def _read_released(path: str | Path, config: ReleasedSettings | None, weights: str = "ema") -> _Released:
    path = Path(path)
    if path.suffix == ".safetensors":
        tree, tensors = None, read_safetensors(path)[0]
    else:
        tree = read_torch_file(path)
        tensors = state_dict_of(tree, weights)
    require_finite(tensors, path)
    settings = config if config is not None else tree.get("config", {}) if tree is not None else {}
    if isinstance(config, str | Path):
        settings = read_yaml(config)
    elif isinstance(settings, str):  # SemVAE checkpoints carry YAML text
        settings = yaml.safe_load(settings)
    if not isinstance(settings, Mapping):
        raise ValueError(f"the settings of {path} are a {type(settings).__name__}, not keys with values; pass config=")
    return _Released(tensors, settings, tree)


def _without_training_state(tree: dict, weights: str) -> dict:
    kept = (weights, "config", "model_state_dict", "state_dict", "iteration", "input_dim", "bottleneck_dim")
    return {key: value for key, value in tree.items() if key in kept or isinstance(value, Tensor)}


def _dit(config: ModelConfig, tensors: Mapping[str, Tensor], source: object, **runtime: Any) -> LightningDiT:
    with torch.device("meta"):
        model = LightningDiT(config, **runtime)
    return _filled(model, tensors, source)


def _semvae(config: SemVAEConfig, tensors: Mapping[str, Tensor], source: object) -> SemVAE:
    with torch.device("meta"):
        model = SemVAE(config)
    return _filled(model, tensors, source)


def _filled(model: nn.Module, tensors: Mapping[str, Tensor], source: object) -> nn.Module:
    check_fit(model, tensors, f"the weights of {source}")
    model.load_state_dict(dict(tensors), assign=True)
    return model.eval()


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError that names what is missing, unexpected or of another shape."""
    expected = model.state_dict()
    problems = [f"'{name}' is missing" for name in expected if name not in tensors]
    problems += [f"'{name}' is unexpected" for name in tensors if name not in expected]
    problems += [
        f"'{name}' is {tuple(tensors[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        listed = "; ".join(problems[:3])
        raise ValueError(f"{source} do not fit the model (another size or another config): {listed}{more}")


def _lists_as_tuples(value: Any) -> Any:
    """JSON has no tuples; a config has no lists."""
    if isinstance(value, list):
        return tuple(_lists_as_tuples(item) for item in value)
    return {key: _lists_as_tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _statistics_as_json(statistics: LatentStatistics) -> dict[str, Any]:
    """Exact: a float32 is written as the shortest decimal that reads back as the same float64."""
    names = ("texture_mean", "texture_std", "semantic_mean", "semantic_std")
    return {name: getattr(statistics, name).tolist() for name in names} | {"multiplier": statistics.multiplier}
