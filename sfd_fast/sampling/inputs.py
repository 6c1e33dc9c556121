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


def checked_labels(labels: Integers, num_classes: int) -> Tensor:
    """Classes as (N,) int64 on the CPU; ValueError for one that the model has not."""
    labels = whole_numbers(labels, "class_labels")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ValueError(
            f"label {labels[outside][0].item()} is out of range: this model has the classes 0 to {num_classes - 1}"
        )
    return labels


def checked_ids(sample_ids: Integers | None, count: int) -> Tensor:
    """Sample ids as (N,) int64 on the CPU; ValueError where there are not as many as images."""
    ids = torch.arange(count) if sample_ids is None else whole_numbers(sample_ids, "sample_ids")
    require(len(ids) == count, f"{count} images but {len(ids)} sample_ids: give one id per image")
    require(not (ids < 0).any(), f"sample id {ids.min().item() if len(ids) else 0} must not be negative")
    return ids


def checked_noise(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A call's own noise as float32. Raises ValueError for another shape, and for values that are not finite."""
    given = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
    require(
        given == shape and latents.is_floating_point(),
        f"latents must be a tensor of standard normals of shape {shape} (images, channels, height, width), not {given}",
    )
    require(bool(latents.isfinite().all()), "latents hold NaN or infinity: give standard normals")
    return latents.float()


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
