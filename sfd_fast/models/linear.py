"""nn.Linear whose backward pass on a CPU with AMX reads operands as the matrix unit wants them.

The gradient of the weight is dy^T x. oneDNN multiplies a transposed bf16 operand at half the speed of a plain one, so
dy is transposed first, by an operator that sums the bias's gradient in the same pass. Elsewhere it is F.linear.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from sfd_kernels import transpose_with_sums
from sfd_kernels.registry import is_reference_only, needs_reference
from torch import Tensor, nn

ENOUGH_ROWS = 256
"""fewer are multiplied in less time than a call of ours takes"""


class Linear(nn.Linear):
    """x W^T + b: (..., in) -> (..., out); the bits of nn.Linear, its weight's gradient up to the order of its sums."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; see `Linear`."""
    if not _pays(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Product.apply(x, weight, bias)


def _pays(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not weight.requires_grad:
        return False
    if not torch.is_grad_enabled() or is_reference_only() or needs_reference():
        return False
    cast = torch.is_autocast_enabled("cpu")
    is_bf16 = torch.get_autocast_dtype("cpu") == torch.bfloat16 if cast else x.dtype == weight.dtype == torch.bfloat16
    return is_bf16 and x.numel() >= ENOUGH_ROWS * x.shape[-1] and has_amx()


@functools.cache
def has_amx() -> bool:
    """Whether the CPU multiplies tiles of bf16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


class _Product(torch.autograd.Function):
    """F.linear of tensors of one 16-bit dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dy_t, sums = transpose_with_sums(dy.flatten(0, -2))
        return dx, dy_t @ x.flatten(0, -2), sums if ctx.has_bias else None
