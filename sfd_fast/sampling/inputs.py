"""What a pipeline's call is given, as tensors: labels and sample ids of every integer type, and the seed."""

import operator
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from sfd_fast.config import require

ARRAYS = (Tensor, np.ndarray, np.generic)
Integers = int | Iterable[int] | np.ndarray | Tensor


def whole_numbers(values: Integers, name: str) -> Tensor:
    """(N,) int64 on the CPU, of a number or of any sequence, array or tensor of numbers, 0-d ones among them.

    Raises ValueError for what is no whole number (a truth value is none), and for more than one dimension.
    """
    values = values.tolist() if isinstance(values, ARRAYS) else values
    items = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    items = [item.item() if isinstance(item, ARRAYS) and item.ndim == 0 else item for item in items]
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool) or not -(2**63) <= item < 2**63:
            raise ValueError(f"{name} must be one-dimensional integers of 64 bits, not {str(item)[:50]}")
    return torch.tensor(items, dtype=torch.int64)


def checked_inputs(
    labels: Integers, sample_ids: Integers | None, seed: int, num_classes: int
) -> tuple[Tensor, Tensor, int]:
    """Labels and sample ids as (N,) int64 tensors on the CPU, and the seed; ValueError for what cannot be drawn."""
    labels = whole_numbers(labels, "labels")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ValueError(
            f"label {labels[outside][0].item()} is out of range: this model has the classes 0 to {num_classes - 1}"
        )
    ids = torch.arange(len(labels)) if sample_ids is None else whole_numbers(sample_ids, "sample_ids")
    require(
        ids.shape == labels.shape,
        f"{len(labels)} labels but sample_ids of shape {tuple(ids.shape)}: give one id per label",
    )
    require(not (ids < 0).any(), f"sample id {ids.min().item() if len(ids) else 0} must not be negative")
    return labels, ids, checked_seed(seed)


def checked_classes(classes: Integers, num_classes: int) -> tuple[int, ...]:
    """The classes that a model has seen, in order. Raises ValueError for what are no classes of it, and for none."""
    found = sorted(set(whole_numbers(classes, "classes").tolist()))
    require(
        bool(found) and found[0] >= 0 and found[-1] < num_classes,
        f"trained classes {str(found)[:60]} must be some of 0 to {num_classes - 1}",
    )
    return tuple(found)


def checked_seed(seed: int) -> int:
    """The seed as a Python int, of any integer type. Raises ValueError for what is none, and out of range."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = None
    require(number is not None and not isinstance(seed, bool | np.bool_), f"seed {seed} must be a whole number")
    require(0 <= number < 2**63, f"seed {number} must be in [0, 2^63)")
    return number
