"""Tensors in safetensors files, with one JSON description in the file's metadata."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.messages import first_line

KEY = "sfd_fast"
"""one metadata key: safetensors writes several in no fixed order, and equal tensors should be equal files"""


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], description: dict[str, Any] | None = None) -> None:
    """An atomic safetensors file, every tensor in its own dtype, with a JSON description in its metadata."""
    write_atomically(path, lambda temporary: store_safetensors(temporary, tensors, description))


def store_safetensors(path: Path, tensors: Mapping[str, Tensor], description: dict[str, Any] | None = None) -> None:
    """The same in place: for files of a folder that is replaced as a whole."""
    from safetensors.torch import save_file  # here, as below: networks run where only torch is installed

    metadata = None if description is None else {KEY: json.dumps(description, sort_keys=True)}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a safetensors file and its description (empty where it has none).

    Raises FileNotFoundError, or ValueError for a truncated or damaged file.
    """
    return _read(path, tensors=True)


def read_description(path: Path) -> dict[str, Any]:
    """The description of a safetensors file without its tensors; raises as read_safetensors."""
    return _read(path, tensors=False)[1]


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
            return found, description_of(file)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or damaged: {first_line(error)}") from None


def description_of(file: Any) -> dict[str, Any]:
    """The description in an open safetensors file."""
    description = json.loads((file.metadata() or {}).get(KEY, "{}"))
    if not isinstance(description, dict):
        raise ValueError(f"its description is a {type(description).__name__}, not an object")
    return description


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """What is built inside is float32, whatever torch.set_default_dtype says: weights have the same bits everywhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def require_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"the weights of {source} hold NaN or infinity (first in '{name}'): that run diverged or the file is "
                "damaged; take an earlier checkpoint"
            )


def check_fit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError that names what of `expected` (a state dict) is missing, unexpected or of another shape."""
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
