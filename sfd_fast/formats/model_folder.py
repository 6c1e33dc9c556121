"""Our model format: a directory with model.safetensors, which carries its kind and config; networks in and out.

    DIR/model.safetensors   weights; metadata "sfd_fast" holds one sorted JSON: format, kind, config, ...
    DIR/config.json         the same JSON for people and search; never read back
    DIR/sfd_fast.json       our mark and the digests of all files, see marked_folder.py
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfd_fast.config import ModelConfig, SemVAEConfig, SFDConfig, from_dict, to_dict
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.files import tensors as files
from sfd_fast.files.home import with_home
from sfd_fast.files.messages import naming
from sfd_fast.files.pretrained import MOST_LAYERS
from sfd_fast.files.tensors import (
    check_fit,
    float32_by_default,
    read_safetensors,
    require_finite,
    store_safetensors,
)
from sfd_fast.formats.marked_folder import WEIGHTS, check_files, replace_marked
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.semvae import SemVAE

READABLE = "config.json"
FORMAT = 1
CARD = ("classes", "id2label", "texture_codec")
"""what a network's card tells of its data: labels that it has seen, names of the classes, what encoded the texture"""
REST = "released.safetensors"
"""what a released file held beside the weights (raw weights, optimizer, settings): kept for the way back"""


class Stored(NamedTuple):
    """Content of a directory."""

    kind: str
    content: dict[str, Any]
    tensors: dict[str, Tensor]


@with_home
def write_directory(
    folder: str | Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    content: dict[str, Any],
    rest: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> None:
    """Writes a model's directory; killed at any moment, it leaves the old model or the new one.

    rest: tensors and description of REST, where the model comes from a released file.
    Raises ValueError where something that is not ours lies there, OSError where the place cannot be written; the
    previous model is then intact.
    """
    description = {"format": FORMAT, "kind": kind, **content}

    def write(temporary: Path) -> None:
        store_safetensors(temporary / WEIGHTS, tensors, description)
        (temporary / READABLE).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
        if rest is not None:
            store_safetensors(temporary / REST, *rest)

    replace_marked(folder, kind, write)


@with_home
def read_description(folder: str | Path, kind: str | None = None) -> tuple[str, dict[str, Any]]:
    """(kind, content) of a directory without its tensors; `kind` insists on one.

    Raises FileNotFoundError, or ValueError for a damaged file, another format or kind.
    """
    path = Path(folder, WEIGHTS)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no model directory: it has no {WEIGHTS}")
    description = files.read_description(path)
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{path} carries no config of this system (format {description.get('format')}, expected {FORMAT}); for "
            "released weights use `sfd convert`"
        )
    found = description.get("kind")
    if kind is not None and found != kind:
        raise ValueError(f"{folder} holds a model of kind '{found}', not '{kind}'")
    return found, {key: value for key, value in description.items() if key not in ("kind", "format")}


@with_home
def read_directory(folder: str | Path, kind: str | None = None) -> Stored:
    """Reads what `write_directory` wrote.

    Raises as `read_description`, and ValueError for NaN or infinity inside and for a file that is not what was written.
    """
    found, content = read_description(folder, kind)
    check_files(folder)
    tensors, _ = read_safetensors(Path(folder, WEIGHTS))
    require_finite(tensors, folder)
    return Stored(found, content, tensors)


@with_home
def save_model(
    path: str | Path,
    model: LightningDiT | SemVAE,
    *,
    config: SFDConfig | None = None,
    statistics: LatentStatistics | None = None,
    weights: Mapping[str, Tensor] | None = None,
    card: Mapping[str, Any] | None = None,
    rest: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> None:
    """Writes a model's directory, atomically.

    config: of the run that trained a LightningDiT (delta_t is part of it); statistics: of the latents it saw; weights:
    stored instead of the model's own (an EMA); card: anything JSON for the record (step, data, metrics); rest: of
    `write_directory`.
    Raises ValueError where these do not belong to the model, and as `write_directory`.
    """
    kind = "dit" if isinstance(model, LightningDiT) else "semvae"
    if config is not None and kind == "dit" and config.model != model.config:
        raise ValueError("config.model is not the config of the model that is being saved")
    tensors = dict(model.state_dict())
    if weights is not None:
        check_fit(model.state_dict(), weights, "the given weights")
        tensors = {name: weights[name] for name in tensors}
    settings = to_dict(model.config)
    if kind == "dit":
        settings = {"model": settings} if config is None else to_dict(config)
    content: dict[str, Any] = {"config": settings, "card": dict(card or {})}
    if statistics is not None:
        content["statistics"] = statistics.to_json()
    write_directory(path, kind, tensors, content, rest)


@with_home
def read_config(path: str | Path) -> SFDConfig:
    """Config of the run that trained the LightningDiT of a directory. ValueError where it was saved without one."""
    with naming(path):
        settings = read_description(path, "dit")[1]["config"]
        if set(settings) == {"model"}:
            raise ValueError(
                f"{path} was saved with its network's config only; save_model(..., config=...) keeps it all"
            )
        return from_dict(SFDConfig, settings)


@with_home
def read_statistics(path: str | Path) -> LatentStatistics | None:
    """Statistics of the latents that the LightningDiT of a directory was trained on, if they were saved."""
    with naming(path):
        values = read_description(path, "dit")[1].get("statistics")
        return None if values is None else LatentStatistics.from_json(values)


def build_dit(config: ModelConfig, tensors: Mapping[str, Tensor], source: object, **runtime: Any) -> LightningDiT:
    """The network with these weights, in eval mode. ValueError where they do not fit."""
    return fill(lambda: LightningDiT(config, **runtime), config.depth, tensors, source)


def build_semvae(config: SemVAEConfig, tensors: Mapping[str, Tensor], source: object) -> SemVAE:
    """The SemVAE with these weights, in eval mode. ValueError where they do not fit."""
    depth = 0 if config.architecture in ("linear", "pca") else config.encoder_depth + config.decoder_depth
    return fill(lambda: SemVAE(config), max(depth, config.num_layers), tensors, source)


def fill(build: Callable[[], nn.Module], depth: int, tensors: Mapping[str, Tensor], source: object) -> nn.Module:
    """What `build` makes, with these tensors as its weights; nothing is initialised first. depth: its blocks."""
    with naming(source):
        if depth > max(len(tensors), MOST_LAYERS):  # building them would take for ever
            raise ValueError(f"its config says {depth} blocks, but it holds {len(tensors)} tensors")
        with torch.device("meta"), float32_by_default():
            model = build()
        check_fit(model.state_dict(), tensors, f"the weights of {source}")
        model.load_state_dict(dict(tensors), assign=True)
    return model.eval()
