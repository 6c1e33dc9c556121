"""nn.Linear as a CPU with AMX wants it, in bf16; elsewhere F.linear.

Forward: F.linear copies the bias into every row of the result and multiplies on top of it; oneDNN's own call adds it to
the product on the way out. Both round once: the same bits.
Backward: the gradient of the weight is dy^T x. oneDNN multiplies a transposed operand at half the speed of a plain one,
so dy is transposed first, by an operator that sums the bias's gradient in the same pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from sfd_kernels import transpose_with_sums
from sfd_kernels.registry import is_reference_only, needs_reference
from torch import Tensor, nn

from sfd_fast.models.processor import has_amx

ENOUGH_ROWS = 256
"""fewer are multiplied in less time than a call of ours takes"""


class Linear(nn.Linear):
    """x W^T + b: (..., in) -> (..., out); the bits of nn.Linear, its weight's gradient up to the order of its sums."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; see `Linear`."""
    if torch.compiler.is_compiling() or not _is_for_amx(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        x, weight, bias = x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, bias)):
        return _product(x, weight, bias)
    enough = weight.requires_grad and x.numel() >= ENOUGH_ROWS * x.shape[-1]
    return _Product.apply(x, weight, bias) if enough else F.linear(x, weight, bias)


def _is_for_amx(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or not has_amx() or is_reference_only() or needs_reference():
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == weight.dtype == torch.bfloat16


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of bf16 tensors below autograd."""
    if bias is None or x.dim() < 2 or not x.numel() or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # what torch.compile calls


class _Product(torch.autograd.Function):
    """`_product` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        with torch.autocast("cpu", enabled=False):
            return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dy_t, sums = transpose_with_sums(dy.flatten(0, -2))
        return dx, dy_t @ x.flatten(0, -2), sums if ctx.has_bias else None
