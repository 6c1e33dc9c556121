"""Networks from files of the released system or of ours, and one into the other, without loss in either direction.

    load_model / load_semvae            a network, of our folder or of a released file
    load_released                       a released checkpoint as a ready network
    convert_released / export_released  one into the other
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from sfd_fast.config import ModelConfig, SemVAEConfig, SFDConfig, from_dict
from sfd_fast.files.home import with_home
from sfd_fast.files.messages import naming
from sfd_fast.files.tensors import read_safetensors, require_finite
from sfd_fast.files.torch_file import PickledConfig, read_torch_file, write_torch_file
from sfd_fast.files.yaml_text import parse_yaml
from sfd_fast.formats.model_folder import (
    REST,
    build_dit,
    build_semvae,
    read_config,
    read_directory,
    save_model,
)
from sfd_fast.formats.released_config import read_config as read_released_config
from sfd_fast.formats.released_config import read_settings, to_released
from sfd_fast.formats.released_file import pack_tree, state_dict_of, unpack_tree, without_wrappers
from sfd_fast.formats.released_network import constructor_arguments, model_config
from sfd_fast.formats.released_semvae import is_pca, pca_weights, semvae_config, semvae_to_released
from sfd_fast.formats.texture import save_codec, texture_codec_from_ldm, without_losses
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.semvae import SemVAE
from sfd_fast.models.texture import TextureCodec

ReleasedSettings = Mapping[str, Any] | str | Path
"""a released YAML (path or tree), or the released constructor's arguments"""


@with_home
def load_model(path: str | Path, **runtime: Any) -> LightningDiT:
    """The network of a directory that `save_model` wrote (or of a released file), on the CPU, in eval mode.

    runtime: residual, attention_backend, checkpoint_activations of LightningDiT.
    Raises FileNotFoundError, or ValueError for damaged, diverged or foreign weights.
    """
    if Path(path).is_file():
        return load_released(path)
    with naming(path):
        stored = read_directory(path, "dit")
        return build_dit(from_dict(ModelConfig, stored.content["config"]["model"]), stored.tensors, path, **runtime)


@with_home
def load_semvae(path: str | Path, config: ReleasedSettings | None = None) -> SemVAE:
    """The SemVAE of our directory or of a released file (.pt, .safetensors), on the CPU, in eval mode.

    config: settings for a file that does not carry them, for example {"num_heads": 6}.
    Raises as `load_model`.
    """
    with naming(path):
        if Path(path).is_dir():
            stored = read_directory(path, "semvae")
            return build_semvae(from_dict(SemVAEConfig, stored.content["config"]), stored.tensors, path)
        released = _read_released(path, config)
        return build_semvae(semvae_config(released.weights, released.settings), released.weights, path)


@with_home
def load_released(
    path: str | Path, config: ReleasedSettings | None = None, *, weights: str = "ema"
) -> LightningDiT:
    """A ready network, on the CPU and in eval mode, from a released .pt or from .safetensors under the released names.

    config: released YAML (path or tree) or the released constructor's arguments, where the file carries none (they win
    over those it carries). weights: "ema" or "model". No pickled code runs.
    Raises FileNotFoundError; ValueError for truncated, refused, diverged or foreign files and contradictory settings.
    """
    with naming(path):
        released = _read_released(path, config, weights)
        arguments = constructor_arguments(released.settings)
        return build_dit(model_config(arguments, released.weights), released.weights, path)


class Converted(NamedTuple):
    """What `convert_released` made."""

    kind: str
    """dit, semvae or texture"""
    ignored: list[str]
    """released settings without a counterpart here (they are kept for the way back)"""


@with_home
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
    with naming(source):
        released = _read_released(source, config, weights)
        settings, ignored, rest = None, [], None
        if released.tree is not None:
            tree = released.tree if keep_training_state else _without_training_state(released.tree, weights)
            text, tensors = pack_tree(tree, without_losses(released.weights))
            rest = tensors, {"tree": text}
        if "x_embedder.proj.weight" in released.weights:
            settings, ignored = read_released_config(released.settings, released.weights)
            model = build_dit(settings.model, released.weights, source)
        elif "quant_conv.weight" in released.weights:
            model = texture_codec_from_ldm(released.weights, source)
        else:
            model = build_semvae(semvae_config(released.weights, released.settings), released.weights, source)
    if isinstance(model, TextureCodec):
        save_codec(target, model, rest)
        return Converted("texture", [])
    card = {"source": Path(source).name} | ({} if settings is None else {"weights": weights})
    save_model(target, model, config=settings, card=card, rest=rest)
    return Converted("semvae" if settings is None else "dit", ignored)


@with_home
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


@with_home
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
    safe = path.suffix == ".safetensors"
    tree = None if safe else read_torch_file(path)
    settings = config if config is not None else tree.get("config") or {} if isinstance(tree, Mapping) else {}
    if isinstance(settings, str | Path) and settings is config:
        settings = read_settings(config)
    elif isinstance(settings, str):  # SemVAE checkpoints carry YAML text
        settings = parse_yaml(settings, f"the config inside {path}") or {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"the settings of {path} are a {type(settings).__name__}, not keys with values; pass config=")
    if is_pca(tree):
        tree, tensors = None, pca_weights(tree, settings.get("latent_channels"))
    else:
        tensors = without_wrappers(read_safetensors(path)[0]) if safe else state_dict_of(tree, weights)
    require_finite(tensors, path)
    return _Released(tensors, settings, tree)


def _without_training_state(tree: dict, weights: str) -> dict:
    kept = (weights, "config", "model_state_dict", "state_dict", "iteration", "input_dim", "bottleneck_dim")
    return {key: value for key, value in tree.items() if key in kept or isinstance(value, Tensor)}
