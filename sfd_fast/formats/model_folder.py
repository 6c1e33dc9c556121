"""Our model format: a directory with model.safetensors, which carries its kind and config; every write is atomic.

    DIR/model.safetensors   weights; metadata "sfd_fast" holds one sorted JSON: format, kind, config, ...
    DIR/config.json         the same JSON for people and search; never read back
"""

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
READABLE = "config.json"
KEY = "sfd_fast"
"""one metadata key: safetensors writes several in no fixed order, and equal models should be equal files"""
FORMAT = 1


def first_line(error: Exception) -> str:
    """The first sentence of an error's message."""
    return re.split(r"\n|\. ", str(error).strip())[0][:200] or type(error).__name__


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a temporary file beside `path`, makes it durable and puts it in place of `path` in one step.

    Raises OSError that names the path and says that the previous file, if there was one, is intact.
    """
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    previous = "the previous file is intact" if path.exists() else "nothing was left behind"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        for place in (temporary, path.parent):
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        temporary.replace(path)
    except Exception as error:
        if isinstance(error, ValueError | TypeError):
            raise
        raise OSError(f"{path} could not be written ({first_line(error)}); {previous}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """An atomic safetensors file with a JSON description in its metadata."""
    metadata = {KEY: json.dumps(description, sort_keys=True)}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a safetensors file and its description (empty where it has none).

    Raises FileNotFoundError, or ValueError for a truncated or damaged file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return _read(path, tensors=True)


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
            return found, json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {first_line(error)}") from None


class Stored(NamedTuple):
    """Content of a directory."""

    kind: str
    content: dict[str, Any]
    tensors: dict[str, Tensor]


def write_directory(folder: str | Path, kind: str, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Writes a model's directory; killed at any moment, it leaves the old model or the new one.

    Raises OSError where the place cannot be written; the previous model is then intact.
    """
    folder = Path(folder)
    description = {"format": FORMAT, "kind": kind, **content}
    readable = json.dumps(description, indent=2, sort_keys=True)
    write_safetensors(folder / WEIGHTS, tensors, description)
    write_atomically(folder / READABLE, lambda temporary: temporary.write_text(readable + "\n"))


def read_description(folder: str | Path, kind: str | None = None) -> tuple[str, dict[str, Any]]:
    """(kind, content) of a directory without its tensors; `kind` insists on one.

    Raises FileNotFoundError, or ValueError for a damaged file, another format or kind.
    """
    path = Path(folder, WEIGHTS)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no model directory: it has no {WEIGHTS}")
    description = _read(path, tensors=False)[1]
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{path} carries no config of this system (format {description.get('format')}, expected {FORMAT}); for "
            "released weights use `sfd convert`"
        )
    found = description["kind"]
    if kind is not None and found != kind:
        raise ValueError(f"{folder} holds a model of kind '{found}', not '{kind}'")
    return found, {key: value for key, value in description.items() if key not in ("kind", "format")}


def read_directory(folder: str | Path, kind: str | None = None) -> Stored:
    """Reads what `write_directory` wrote; raises as `read_description`, and ValueError for NaN or infinity inside."""
    found, content = read_description(folder, kind)
    tensors, _ = read_safetensors(Path(folder, WEIGHTS))
    require_finite(tensors, folder)
    return Stored(found, content, tensors)


def require_finite(tensors: dict[str, Tensor], source: object) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"the weights of {source} hold NaN or infinity (first in '{name}'): that run diverged; take an earlier "
                "checkpoint"
            )
