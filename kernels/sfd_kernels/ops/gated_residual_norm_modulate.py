"""Gated residual addition and the next block's norm and modulation. B batch, N tokens, D width."""

from typing import Any

from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype, normalize, normalize_backward
from sfd_kernels.registry import Op, elements


def gated_residual_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x_new = x + gate * branch;  y = x_new / sqrt(mean(x_new^2) + eps) * weight * (1 + scale) + shift.

    x and branch (B, N, D); gate, shift, scale (B, D), possibly slices of one packed (B, 6D); weight (D,); shift may be
    None. Returns x_new in the dtype of x and y in the dtype of scale; the norm sees x_new as rounded to its dtype.
    Source: LightningDiT block (docs/METHOD.md 3).
    """
    dtype = accumulation_dtype(x, branch, gate, weight, shift, scale)
    x_new = (x.to(dtype) + gate.to(dtype)[:, None] * branch.to(dtype)).to(x.dtype)
    x_hat, _ = normalize(x_new.to(dtype), eps)
    y = x_hat * weight.to(dtype) * (1 + scale.to(dtype)[:, None])
    if shift is not None:
        y = y + shift.to(dtype)[:, None]
    return x_new, y.to(scale.dtype)


def gated_residual_norm_modulate_backward(
    dx_new: Tensor, dy: Tensor, x_new: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dgate, dweight, dshift, dscale) of gated_residual_norm_modulate.

    dx = dx_new + (gradient of the norm at x_new),  dbranch = gate dx,  dgate = sum_n branch dx;  the rest as in
    rms_norm_modulate_backward.
    """
    dtype = accumulation_dtype(dx_new, dy, x_new, branch, gate, weight, scale)
    dy_, weight_, gain = dy.to(dtype), weight.to(dtype), 1 + scale.to(dtype)
    x_hat, rstd = normalize(x_new.to(dtype), eps)
    dx = dx_new.to(dtype) + normalize_backward(dy_ * (weight_ * gain)[:, None], x_hat, rstd)
    dbranch = gate.to(dtype)[:, None] * dx
    dgate = (branch.to(dtype) * dx).sum(1)
    products = (dy_ * x_hat).sum(1)
    dweight = (gain * products).sum(0)
    return (
        dx.to(x_new.dtype),
        dbranch.to(branch.dtype),
        dgate.to(gate.dtype),
        dweight.to(weight.dtype),
        dy_.sum(1).to(scale.dtype),
        (weight_ * products).to(scale.dtype),
    )


def _examples(make, size):
    b, n, d = size.batch, size.tokens, size.width
    gate, scale, shift = make.packed(6, b, d)[:3]
    yield "shift", (make.wide(b, n, d), make.narrow(b, n, d), gate, make.weight(d), shift, scale, 1e-6)
    if size.is_tiny:
        yield "no shift", (make.wide(b, n, d), make.narrow(b, n, d), gate, make.weight(d), None, scale, 1e-6)


def _backward_examples(make, size):
    for label, (x_new, branch, gate, weight, _, scale, eps) in _examples(make, size):
        dx_new, dy = make.wide(*x_new.shape), make.narrow(*x_new.shape)
        yield label, (dx_new, dy, x_new, branch, gate, weight, scale, eps)
        return


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, branch, gate, weight, shift, scale, ctx.eps = inputs
    ctx.has_shift = shift is not None
    ctx.save_for_backward(output[0], branch, gate, weight, scale)


def _gradient(ctx: Any, dx_new: Tensor, dy: Tensor) -> tuple:
    dx, dbranch, dgate, dweight, dshift, dscale = gated_residual_norm_modulate_backward(
        dx_new, dy, *ctx.saved_tensors, ctx.eps
    )
    return dx, dbranch, dgate, dweight, dshift if ctx.has_shift else None, dscale, None


gated_residual_norm_modulate_backward = Op(
    gated_residual_norm_modulate_backward, examples=_backward_examples, flops=elements(0, 18)
)
gated_residual_norm_modulate = Op(
    gated_residual_norm_modulate,
    examples=_examples,
    flops=elements(0, 8),
    backward=gated_residual_norm_modulate_backward,
)
gated_residual_norm_modulate.register_autograd(_gradient, setup_context=_setup)
