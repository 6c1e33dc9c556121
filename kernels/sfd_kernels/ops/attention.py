"""Softmax attention of every head. B batch, N tokens, H heads, d head_dim."""

from typing import Any

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype
from sfd_kernels.registry import Op

ON_CUDA = "libraries serve it: flash-attn, cuDNN and torch SDPA, which sfd_fast.models.attention chooses from"


def _by_head(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """(B, N, H, d) -> (B, H, N, d) in dtype."""
    return [tensor.to(dtype).transpose(1, 2) for tensor in tensors]


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out = softmax(q k^T / sqrt(d)) v for each head, and lse, the log-sum-exp of the scores q k^T / sqrt(d).

    q, k, v (B, N, H, d), of one dtype. Returns out (B, N, H, d) in that dtype and lse (B, H, N), float32 or float64.
    Source: arXiv 1706.03762; blocks with a running maximum, arXiv 1805.02867 and 2205.14135.
    """
    q_, k_, v_ = _by_head(accumulation_dtype(q, k, v), q, k, v)
    scores = q_ @ k_.transpose(-1, -2) * q.shape[-1] ** -0.5
    out = torch.softmax(scores, dim=-1) @ v_
    return out.transpose(1, 2).to(q.dtype), torch.logsumexp(scores, dim=-1)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each (B, N, H, d) in the dtype of q.

    With P = exp(q k^T / sqrt(d) - lse) and dS = P (dout v^T - rowsum(dout out) + dlse) / sqrt(d):
    dq = dS k, dk = dS^T q, dv = P^T dout. dlse None: zero.
    """
    dtype, scale = accumulation_dtype(dout, q, k, v, out, lse), q.shape[-1] ** -0.5
    dout_, q_, k_, v_, out_ = _by_head(dtype, dout, q, k, v, out)
    weights = torch.exp(q_ @ k_.transpose(-1, -2) * scale - lse[..., None])
    delta = (dout_ * out_).sum(-1) - (0 if dlse is None else dlse)
    dscores = weights * (dout_ @ v_.transpose(-1, -2) - delta[..., None]) * scale
    found = dscores @ k_, dscores.transpose(-1, -2) @ q_, weights.transpose(-1, -2) @ dout_
    return tuple(grad.transpose(1, 2).to(q.dtype) for grad in found)


def _examples(make, size):
    shape = size.batch, size.tokens, size.heads, size.head_dim
    yield "view of packed qkv", (make.narrow(*shape), make.narrow(*shape), _view(make, shape))
    if size.is_tiny:
        longer = size.batch, 37, size.heads, size.head_dim
        yield "several steps", (make.narrow(*longer), make.narrow(*longer), make.narrow(*longer))


def _view(make, shape: tuple[int, ...]) -> Tensor:
    batch, tokens, heads, head_dim = shape
    return make.narrow(batch, tokens, 3, heads, head_dim)[:, :, 2]


def _backward_examples(make, size):
    for label, (q, k, v) in _examples(make, size):
        out, lse = (tensor.contiguous() for tensor in attention.reference(q, k, v))
        dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(0)).to(lse)
        yield label, (make.narrow(*q.shape), q, k, v, out, lse, dlse)
        if size.is_tiny:
            yield f"{label}, lse unused", (make.narrow(*q.shape), q, k, v, out, lse, None)


def _products(number: int, q: Tensor) -> int:
    batch, tokens, heads, head_dim = q.shape
    return number * 2 * batch * heads * tokens * tokens * head_dim


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    return attention_backward(dout, q, k, v, out, lse, dlse)


attention_backward = Op(
    attention_backward,
    examples=_backward_examples,
    flops=lambda dout, q, *rest: _products(5, q),
    on_cuda=ON_CUDA,
)
attention = Op(
    attention,
    examples=_examples,
    flops=lambda q, *rest: _products(2, q),
    backward=attention_backward,
    on_cuda=ON_CUDA,
)
attention.register_autograd(_gradient, setup_context=_setup)
