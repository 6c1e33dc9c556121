"""RMSNorm followed by adaptive modulation. B batch, N tokens, D width."""

from typing import Any

from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype, normalize, normalize_backward
from sfd_kernels.registry import Op, elements


def rms_norm_modulate(x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift.

    x (B, N, D), weight (D,), shift and scale (B, D), possibly slices of one packed (B, 6D); shift may be None.
    Returns (B, N, D) in the dtype of scale: in the autocast mix the next Linear takes bf16.
    Source: LightningDiT block (docs/METHOD.md 3); RMSNorm, arXiv 1910.07467.
    """
    dtype = accumulation_dtype(x, weight, shift, scale)
    x_hat, _ = normalize(x.to(dtype), eps)
    y = x_hat * weight.to(dtype) * (1 + scale.to(dtype)[:, None])
    if shift is not None:
        y = y + shift.to(dtype)[:, None]
    return y.to(scale.dtype)


def rms_norm_modulate_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dshift, dscale) of rms_norm_modulate; nothing but its inputs is needed.

    With x_hat = x rstd and A_b = sum_n dy x_hat:  dscale_b = weight A_b,  dshift_b = sum_n dy,
    dweight = sum_b (1 + scale_b) A_b,  dx = rstd (g - x_hat mean(g x_hat)) with g = dy weight (1 + scale).
    """
    dtype = accumulation_dtype(dy, x, weight, scale)
    dy_, weight_, gain = dy.to(dtype), weight.to(dtype), 1 + scale.to(dtype)
    x_hat, rstd = normalize(x.to(dtype), eps)
    dx = normalize_backward(dy_ * (weight_ * gain)[:, None], x_hat, rstd)
    products = (dy_ * x_hat).sum(1)
    dweight = (gain * products).sum(0)
    dshift, dscale = dy_.sum(1), weight_ * products
    return dx.to(x.dtype), dweight.to(weight.dtype), dshift.to(scale.dtype), dscale.to(scale.dtype)


def _examples(make, size):
    b, n, d = size.batch, size.tokens, size.width
    scale, shift = make.packed(6, b, d)[:2]
    yield "shift", (make.wide(b, n, d), make.weight(d), shift, scale, 1e-6)
    if size.is_tiny:
        yield "no shift", (make.wide(b, n, d), make.weight(d), None, scale, 1e-6)
        yield "one token", (make.wide(b, 1, 5), make.weight(5), shift[:, :5], scale[:, :5], 1e-6)


def _backward_examples(make, size):
    for label, (x, weight, _, scale, eps) in _examples(make, size):
        if label != "no shift":
            yield label, (make.narrow(*x.shape), x, weight, scale, eps)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, shift, scale, ctx.eps = inputs
    ctx.has_shift = shift is not None
    ctx.save_for_backward(x, weight, scale)


def _gradient(ctx: Any, dy: Tensor) -> tuple:
    x, weight, scale = ctx.saved_tensors
    dx, dweight, dshift, dscale = rms_norm_modulate_backward(dy, x, weight, scale, ctx.eps)
    return dx, dweight, dshift if ctx.has_shift else None, dscale, None


rms_norm_modulate_backward = Op(rms_norm_modulate_backward, examples=_backward_examples, flops=elements(0, 14))
rms_norm_modulate = Op(
    rms_norm_modulate, examples=_examples, flops=elements(0, 6), backward=rms_norm_modulate_backward
)
rms_norm_modulate.register_autograd(_gradient, setup_context=_setup)
