"""SwiGLU from the packed projection. H hidden width."""

from typing import Any

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype
from sfd_kernels.registry import Op, elements


def swiglu(x: Tensor) -> Tensor:
    """SiLU(x[..., :H]) * x[..., H:].

    x (..., 2H), packed [gate | up]. Returns (..., H) in the dtype of x.
    Source: arXiv 2002.05202; packing of LightningDiT's w12 (docs/METHOD.md 3).
    """
    gate, up = x.to(accumulation_dtype(x)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx of swiglu: [dy up SiLU'(gate) | dy SiLU(gate)], with SiLU'(g) = s (1 + g (1 - s)) and s = sigmoid(g)."""
    dtype = accumulation_dtype(dy, x)
    gate, up = x.to(dtype).chunk(2, dim=-1)
    s, dy_ = torch.sigmoid(gate), dy.to(dtype)
    return torch.cat([dy_ * up * s * (1 + gate * (1 - s)), dy_ * gate * s], dim=-1).to(x.dtype)


def _examples(make, size):
    yield "packed", (make.narrow(size.batch, size.tokens, 2 * size.hidden),)
    if size.is_tiny:
        yield "rows", (make.narrow(size.batch, 2 * size.hidden),)


def _backward_examples(make, size):
    for label, (x,) in _examples(make, size):
        yield label, (make.narrow(*x.shape[:-1], x.shape[-1] // 2), x)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dy: Tensor) -> Tensor:
    return swiglu_backward(dy, *ctx.saved_tensors)


swiglu_backward = Op(swiglu_backward, examples=_backward_examples, flops=elements(0, 12))
swiglu = Op(swiglu, examples=_examples, flops=elements(0, 3), backward=swiglu_backward)
swiglu.register_autograd(_gradient, setup_context=_setup)
