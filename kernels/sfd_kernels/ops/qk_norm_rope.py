"""Queries and keys from packed qkv: RMSNorm per head, rotary embedding. B batch, N tokens, H heads, d head_dim."""

from typing import Any

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype, normalize, normalize_backward
from sfd_kernels.registry import Op, is_reference_only, needs_reference, num_bytes


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) on interleaved pairs. x (B, N, H, d), cos and sin (N, d)."""
    if cos is None:
        return x
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return x * cos.to(x.dtype)[:, None] + turned * sin.to(x.dtype)[:, None]


def _rotate_backward(dx: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Transpose of `_rotate`."""
    if cos is None:
        return dx
    a, b = (dx * sin.to(dx.dtype)[:, None]).unflatten(-1, (-1, 2)).unbind(-1)
    return dx * cos.to(dx.dtype)[:, None] + torch.stack([b, -a], dim=-1).flatten(-2)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q = R(q / sqrt(mean(q^2) + eps) * q_weight), k likewise, with R the rotation of interleaved pairs.

    qkv (B, N, 3, H, d); weights (d,), None: no normalisation; cos and sin (N, d), None: no rotation; both entries of a
    pair are read. Returns q and k, each (B, N, H, d) in the dtype of qkv. cos and sin get no gradient.
    Source: QK-norm and VisionRotaryEmbedding of LightningDiT (docs/METHOD.md 3); RoPE, arXiv 2104.09864.
    """
    dtype = accumulation_dtype(qkv, q_weight, k_weight)
    outputs = []
    for index, weight in enumerate((q_weight, k_weight)):
        head = qkv[:, :, index].to(dtype, copy=True)
        if weight is not None:
            head = normalize(head, eps)[0] * weight.to(dtype)
        outputs.append(_rotate(head, cos, sin).to(qkv.dtype))
    return outputs[0], outputs[1]


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dqkv, dq_weight, dk_weight); dqkv[:, :, 2] is dv (zero if None), so one tensor carries all three gradients.

    The gradient of a weight that is None has shape (0,).
    """
    dtype = accumulation_dtype(dq, dk, qkv, q_weight, k_weight)
    parts, weight_grads = [], []
    for index, (grad, weight) in enumerate(((dq, q_weight), (dk, k_weight))):
        d_head = _rotate_backward(grad.to(dtype), cos, sin)
        if weight is None:
            weight_grads.append(qkv.new_empty(0))
        else:
            x_hat, rstd = normalize(qkv[:, :, index].to(dtype), eps)
            weight_grads.append((d_head * x_hat).sum((0, 1, 2)).to(weight.dtype))
            d_head = normalize_backward(d_head * weight.to(dtype), x_hat, rstd)
        parts.append(d_head.to(qkv.dtype))
    parts.append(torch.zeros_like(parts[0]) if dv is None else dv.to(qkv.dtype))
    return torch.stack(parts, dim=2), weight_grads[0], weight_grads[1]


def _examples(make, size):
    b, n, h, d = size.batch, size.tokens, size.heads, size.head_dim
    cos, sin = make.state(n, d), make.state(n, d)
    qkv = make.narrow(b, n, 3, h, d)
    yield "norm and rope", (qkv, make.weight(d), make.weight(d), cos, sin, 1e-6)
    if size.is_tiny:
        yield "rope", (qkv, None, None, cos, sin, 1e-6)
        yield "norm", (qkv, make.weight(d), make.weight(d), None, None, 1e-6)
        yield "neither", (qkv, None, None, None, None, 1e-6)


def _backward_examples(make, size):
    for label, args in _examples(make, size):
        b, n, _, h, d = args[0].shape
        dq, dk, dv = (make.narrow(b, n, h, d) for _ in range(3))
        yield label, (dq, dk, dv, *args)
        if size.is_tiny and label == "norm and rope":
            yield "no dv", (dq, dk, None, *args)


def _least_bytes(qkv: Tensor, *tables: Any) -> int:
    return num_bytes(qkv) // 3 * 4 + num_bytes(tables)


def _least_bytes_backward(dq: Tensor, dk: Tensor, dv: Tensor | None, qkv: Tensor, *tables: Any) -> int:
    normalized = tables[0] is not None or tables[1] is not None
    inputs = num_bytes((dq, dk, dv)) + (num_bytes(qkv) // 3 * 2 if normalized else 0)
    return inputs + num_bytes(qkv) + num_bytes(tables) + num_bytes(tables[:2])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.eps = inputs[-1]
    ctx.save_for_backward(*inputs[:-1])


def _gradient(ctx: Any, dq: Tensor, dk: Tensor) -> tuple:
    return _packed_gradient(ctx, dq, dk, None)


def _packed_gradient(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor | None) -> tuple:
    qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
    dqkv, dq_weight, dk_weight = qk_norm_rope_backward(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, ctx.eps)
    no_q, no_k = q_weight is None, k_weight is None
    return dqkv, None if no_q else dq_weight, None if no_k else dk_weight, None, None, None


qk_norm_rope_backward = Op(
    qk_norm_rope_backward,
    examples=_backward_examples,
    flops=lambda dq, *rest: 2 * 16 * dq.numel(),
    least_bytes=_least_bytes_backward,
)
qk_norm_rope = Op(
    qk_norm_rope,
    examples=_examples,
    flops=lambda qkv, *rest: 2 * 7 * (qkv.numel() // 3),
    least_bytes=_least_bytes,
    constants=("cos", "sin"),
    backward=qk_norm_rope_backward,
)
qk_norm_rope.register_autograd(_gradient, setup_context=_setup)


class _SplitQkv(torch.autograd.Function):
    """Around qk_norm_rope and its backward, so that one kernel writes the gradients of q, k and v.

    A plain view would cost three more passes: zeros for the missing two thirds, a copy and an addition. torch.compile
    takes this class (fullgraph) and sees the two operators; an operator of its own could not return v as a view.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        q, k = qk_norm_rope(*inputs)
        _setup(ctx, inputs, (q, k))
        return q, k, inputs[0][:, :, 2]

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> tuple:
        if dq is None or dk is None:
            qkv = ctx.saved_tensors[0]
            zeros = torch.zeros_like(qkv[:, :, 0])
            dq, dk = zeros if dq is None else dq, zeros if dk is None else dk
        return _packed_gradient(ctx, dq, dk, dv)


def split_qkv(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for attention, each (B, N, H, d): q and k as `qk_norm_rope` gives them, v a view of qkv.

    The backward pass is one kernel that writes the gradients of q, k and v into one packed tensor.
    """
    args = (qkv, q_weight, k_weight, cos, sin, eps)
    if torch.is_grad_enabled() and not is_reference_only() and not needs_reference():
        return _SplitQkv.apply(*args)
    return *qk_norm_rope(*args), qkv[:, :, 2]
