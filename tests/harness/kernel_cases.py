"""What the kernel tests share: devices, cases from the registry, exact results, and the error bound of a kernel.

A kernel may be wrong by at most twice the reference's own error in that dtype, plus the rounding of its result.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sfd_kernels.registry import INTERPRET, OPS, Op
from torch import Tensor

DEVICES = ["cpu"] if INTERPRET else ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LOW_PRECISION_MODES = ["fp32", "mix"] if INTERPRET else ["fp32", "bf16", "fp16", "mix"]
UNDIFFERENTIATED = ("philox_bits", "philox_normal", "total_norm")
DIFFERENTIABLE = [op for op in OPS.values() if not op.mutates and op.name not in UNDIFFERENTIATED]
FORWARD = [op for op in DIFFERENTIABLE if not op.is_backward]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """function of every tensor in nested lists and tuples; the rest as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in flatten(item)] if isinstance(value, (list, tuple)) else []


def example(op: Op, mode: str = "fp32", label: str | None = None, device: str = "cpu", **size: Any) -> tuple:
    """Arguments of that label; the first example without one."""
    for found, args in op.examples(mode, device=device, **size):
        if label in (None, found):
            return args
    raise AssertionError(f"{op.name} has no example '{label}'")


def cases(ops: list[Op], modes: list[str], without: str | None = None) -> list[Any]:
    """(op, mode, label) of every tiny example but the one labelled `without`, once for each combination of dtypes."""
    found, seen = [], set()
    for op in ops:
        for mode in modes:
            for label, args in op.examples(mode):
                key = (op.name, label, *[tensor.dtype for tensor in flatten(args)])
                if key not in seen and label != without:
                    seen.add(key)
                    found.append(pytest.param(op, mode, label, id=f"{op.name}-{mode}-{label}".replace(" ", "_")))
    return found


def to_double(args: tuple) -> tuple:
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t.clone(), args)


def run(function: Callable, op: Op, args: tuple) -> list[Tensor]:
    """Outputs, or what was written, of function(*args) on clones of args, strides kept."""
    clones = map_tensors(clone, args)
    with torch.no_grad():
        outputs = function(*clones)
    if op.mutates:
        outputs = [arg for name, arg in zip(op.__signature__.parameters, clones) if name in op.mutates]
    return flatten(outputs)


def clone(tensor: Tensor) -> Tensor:
    """A copy with the same strides, also where they overlap or leave gaps."""
    storage = tensor.untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def assert_accurate(ours: list[Tensor], reference: list[Tensor], exact: list[Tensor], what: str = "") -> None:
    """|ours - exact| <= 2 max |reference - exact| + the rounding of the result and of one fp32 operation.

    The Triton interpreter truncates where the GPU rounds: there the rounding may be a whole unit in the last place.
    """
    assert len(ours) == len(reference) == len(exact)
    for index, (got, ref, right) in enumerate(zip(ours, reference, exact)):
        assert got.dtype == ref.dtype and got.shape == ref.shape, f"{what} output {index}: {got.dtype} {got.shape}"
        if not got.is_floating_point():
            assert torch.equal(got, ref), f"{what} output {index}"
            continue
        undefined = right.isnan()
        assert torch.equal(got.isnan(), undefined), f"{what} output {index}: NaN in other places"
        right = right[~undefined]
        if right.numel() == 0:
            continue
        got, ref = got[~undefined].double(), ref[~undefined].double()
        rounding = torch.finfo(ours[index].dtype).eps * (1.0 if INTERPRET else 0.5)
        own = (ref - right).abs().max()
        allowed = 2 * own + rounding * right.abs() + 4 * torch.finfo(torch.float32).eps * right.abs().max() * (
            ours[index].dtype != torch.float64
        )
        excess = ((got - right).abs() - allowed).max()
        assert excess <= 0, f"{what} output {index}: error {(got - right).abs().max():.3g}, reference's own {own:.3g}"


def require_kernel(op: Op) -> None:
    """In the interpreter only operators that have a Triton kernel are worth running."""
    if INTERPRET and op.load_triton() is None:
        pytest.skip(f"{op.name} has no Triton kernel: its reference runs on CUDA")
