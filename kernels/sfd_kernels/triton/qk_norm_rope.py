"""qk_norm_rope and its backward: q and k read once from packed qkv, written once in attention's layout.

B batch, N tokens, H heads, d head_dim. A program owns one token position in a few samples: its row of cos and sin is
read once and stays in registers, and the heads of a token, which are adjacent in memory, are the rows of its tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward
from sfd_kernels.triton.column_sums import column_sums
from sfd_kernels.triton.launch import ceil_div, launch, packed_last, power_of_two, supported

# One warp, no barrier. Samples that share one read of cos, sin and the weights (XL, bf16: 1152 bytes beside 9216 for
# each sample): 4 keep them at 3 % of the bytes. 8192 tokens are then 2048 programs, 15 for each multiprocessor of an
# H100.
SAMPLES, NUM_WARPS = 4, 1

# Heads of a tile at most. Forward: 8 heads of d = 72, masked in a block of 128, are 32 values of q and of k for each
# lane: 96 to 120 registers, so all 15 programs are resident with 36 KB of loads in flight; 16 heads took 128 to 164.
# Backward: five loads for each head; 4 heads 168 registers (12 programs resident, 35 KB in flight), 8 heads 250, and
# forcing 128 spills.
FORWARD_HEADS, BACKWARD_HEADS = 8, 4


def _heads_at_a_time(num_heads: int, most: int) -> int:
    """The largest power of two that divides H, within 4 and `most`: XL (H = 16) and XXL (24) 8 forward, B (12) 4.

    Under 4 heads of d = 64 a lane would hold less than a 128-bit vector of bf16. d = 72 in a block of 128 costs 40
    instructions of a warp for each head forward, where the memory leaves 88 at 3.0 TB/s; splitting it into 64 + 8
    columns was tried: 21 instructions, but 231 registers.
    """
    return min(max(num_heads & -num_heads, 4), most)


@triton.jit
def _vector(pointer, columns, inside):
    return tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _pairs(values):
    """(rows, d) -> the even and the odd columns, each (rows, d / 2)."""
    return tl.split(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)))


@triton.jit
def _interleave(a, b):
    """Inverse of `_pairs`."""
    return tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1] * 2))


@triton.jit
def _normalize_rotate(values, weight, cos, sin, eps, HEAD_DIM: tl.constexpr):
    values = values.to(tl.float32)
    if weight is not None:
        values = values * tl.rsqrt(tl.sum(values * values, 1) / HEAD_DIM + eps)[:, None] * weight
    if cos is not None:
        a, b = _pairs(values)
        cos_a, cos_b = _pairs(cos)
        sin_a, sin_b = _pairs(sin)
        values = _interleave(a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    return values


@triton.jit
def _normalize_rotate_backward(grad, values, weight, cos, sin, eps, HEAD_DIM: tl.constexpr):
    """Gradient of the input and, summed over the rows, of the weight (zeros without one)."""
    grad = grad.to(tl.float32)
    if cos is not None:
        a, b = _pairs(grad)
        cos_a, cos_b = _pairs(cos)
        sin_a, sin_b = _pairs(sin)
        grad = _interleave(a * cos_a + b * sin_b, b * cos_b - a * sin_a)
    d_weight = tl.zeros((grad.shape[1],), tl.float32)
    if weight is not None:
        hat = values.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(hat * hat, 1) / HEAD_DIM + eps)[:, None]
        hat *= rstd
        d_weight = tl.sum(grad * hat, 0)
        grad *= weight
        grad = rstd * (grad - hat * (tl.sum(grad * hat, 1) / HEAD_DIM)[:, None])
    return grad, d_weight


@triton.jit
def _forward(
    qkv, q_weight, k_weight, cos, sin, q, k, batch, tokens, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) % tokens
    first = (tl.program_id(0) // tokens).to(tl.int64) * SAMPLES
    columns = tl.arange(0, BLOCK)
    inside = columns < HEAD_DIM
    # constexpr None where absent
    wq = None if q_weight is None else _vector(q_weight, columns, inside)
    wk = None if k_weight is None else _vector(k_weight, columns, inside)
    c = None if cos is None else _vector(cos + token * HEAD_DIM, columns, inside)
    s = None if cos is None else _vector(sin + token * HEAD_DIM, columns, inside)
    for sample in range(first, tl.minimum(first + SAMPLES, batch)):
        row = sample * tokens + token
        for head in range(0, HEADS, ROWS):
            heads = head + tl.arange(0, ROWS)
            valid = (heads < HEADS)[:, None] & inside[None, :]
            offsets = heads[:, None] * HEAD_DIM + columns[None, :]
            source = qkv + row * (3 * HEADS * HEAD_DIM) + offsets
            query = tl.load(source, mask=valid, other=0.0)
            key = tl.load(source + HEADS * HEAD_DIM, mask=valid, other=0.0)
            target = row * (HEADS * HEAD_DIM) + offsets
            query = _normalize_rotate(query, wq, c, s, eps, HEAD_DIM)
            tl.store(q + target, query.to(q.dtype.element_ty), mask=valid)
            key = _normalize_rotate(key, wk, c, s, eps, HEAD_DIM)
            tl.store(k + target, key.to(k.dtype.element_ty), mask=valid)


@triton.jit
def _backward(
    dq, dk, dv, qkv, q_weight, k_weight, cos, sin, dqkv, partials,
    dq_sample, dq_token, dq_head, dk_sample, dk_token, dk_head, dv_sample, dv_token, dv_head, batch, tokens, eps,
    UNIT: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """Strides are in units of UNIT elements; partials (programs, 2, d): sums of the weights' gradients, or None."""
    token = tl.program_id(0) % tokens
    first = (tl.program_id(0) // tokens).to(tl.int64) * SAMPLES
    columns = tl.arange(0, BLOCK)
    inside = columns < HEAD_DIM
    wq = None if q_weight is None else _vector(q_weight, columns, inside)
    wk = None if k_weight is None else _vector(k_weight, columns, inside)
    c = None if cos is None else _vector(cos + token * HEAD_DIM, columns, inside)
    s = None if cos is None else _vector(sin + token * HEAD_DIM, columns, inside)
    dwq = tl.zeros((BLOCK,), tl.float32)
    dwk = tl.zeros((BLOCK,), tl.float32)
    for sample in range(first, tl.minimum(first + SAMPLES, batch)):
        row = (sample * tokens + token) * (3 * HEADS * HEAD_DIM)
        for head in range(0, HEADS, ROWS):
            heads = head + tl.arange(0, ROWS)
            valid = (heads < HEADS)[:, None] & inside[None, :]
            target = row + heads[:, None] * HEAD_DIM + columns[None, :]
            # All loads go out before the first value is needed.
            at = (sample * dq_sample + token * dq_token + heads[:, None] * dq_head) * UNIT + columns[None, :]
            d_query = tl.load(dq + at, mask=valid, other=0.0)
            query = d_query if q_weight is None else tl.load(qkv + target, mask=valid, other=0.0)
            at = (sample * dk_sample + token * dk_token + heads[:, None] * dk_head) * UNIT + columns[None, :]
            d_key = tl.load(dk + at, mask=valid, other=0.0)
            key = d_key if k_weight is None else tl.load(qkv + target + HEADS * HEAD_DIM, mask=valid, other=0.0)
            if dv is not None:
                at = (sample * dv_sample + token * dv_token + heads[:, None] * dv_head) * UNIT + columns[None, :]
                d_value = tl.load(dv + at, mask=valid, other=0.0)
            else:
                d_value = tl.zeros((ROWS, BLOCK), tl.float32)
            d_query, d_weight = _normalize_rotate_backward(d_query, query, wq, c, s, eps, HEAD_DIM)
            dwq += d_weight
            tl.store(dqkv + target, d_query.to(dqkv.dtype.element_ty), mask=valid)
            d_key, d_weight = _normalize_rotate_backward(d_key, key, wk, c, s, eps, HEAD_DIM)
            dwk += d_weight
            tl.store(dqkv + target + HEADS * HEAD_DIM, d_key.to(dqkv.dtype.element_ty), mask=valid)
            tl.store(dqkv + target + 2 * HEADS * HEAD_DIM, d_value.to(dqkv.dtype.element_ty), mask=valid)
    if partials is not None:
        # Both rows in one store, so that a lane holds a whole 128-bit vector.
        row = tl.arange(0, 2)[:, None] * HEAD_DIM + columns[None, :]
        both = tl.trans(tl.join(dwq, dwk))
        wanted = tl.broadcast_to(inside[None, :], both.shape)
        tl.store(partials + tl.program_id(0) * (2 * HEAD_DIM) + row, both, mask=wanted)


@qk_norm_rope.triton
def forward(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if not supported(qkv, q_weight, k_weight, cos, sin) or (cos is not None and qkv.shape[-1] % 2):
        return NotImplemented
    batch, tokens, _, num_heads, head_dim = qkv.shape
    q, k = (torch.empty((batch, tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    if q.numel() == 0:
        return q, k
    tables = (None if table is None else table.contiguous() for table in (q_weight, k_weight, cos, sin))
    qkv, (q_weight, k_weight, cos, sin) = qkv.contiguous(), tables
    launch(
        _forward, tokens * ceil_div(batch, SAMPLES), qkv, q_weight, k_weight, cos, sin, q, k, batch, tokens, eps,
        HEADS=num_heads, HEAD_DIM=head_dim, BLOCK=power_of_two(head_dim),
        ROWS=_heads_at_a_time(num_heads, FORWARD_HEADS), SAMPLES=SAMPLES, num_warps=NUM_WARPS,
    )  # fmt: skip
    return q, k


@qk_norm_rope_backward.triton
def backward(
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
    if not supported(dq, dk, dv, qkv, q_weight, k_weight, cos, sin) or qkv.numel() == 0:
        return NotImplemented
    batch, tokens, _, num_heads, head_dim = qkv.shape
    tables = (None if table is None else table.contiguous() for table in (q_weight, k_weight, cos, sin))
    qkv, (q_weight, k_weight, cos, sin) = qkv.contiguous(), tables
    # Attention returns gradients in layouts of its own, (B, H, N, d) in memory for instance: any strides over the
    # heads.
    dq, dk, dv = packed_last(dq), packed_last(dk), None if dv is None else packed_last(dv)
    strides = [s for t in (dq, dk, dv) for s in ((0, 0, 0) if t is None else t.stride()[:3])]
    # Triton knows of a stride only whether 16 divides it; d = 72 does not, but 8 elements are what a vector needs.
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    dqkv = torch.empty_like(qkv)
    num_programs = tokens * ceil_div(batch, SAMPLES)
    partials = None
    if q_weight is not None or k_weight is not None:
        partials = torch.empty((num_programs, 2 * head_dim), dtype=torch.float32, device=qkv.device)
    launch(
        _backward, num_programs, dq, dk, dv, qkv, q_weight, k_weight, cos, sin, dqkv, partials,
        *(stride // unit for stride in strides), batch, tokens, eps,
        UNIT=unit, HEADS=num_heads, HEAD_DIM=head_dim, BLOCK=power_of_two(head_dim),
        ROWS=_heads_at_a_time(num_heads, BACKWARD_HEADS), SAMPLES=SAMPLES, num_warps=NUM_WARPS,
    )  # fmt: skip
    weight_grads = [qkv.new_empty(0) if w is None else torch.empty_like(w) for w in (q_weight, k_weight)]
    if partials is not None:
        column_sums(partials, [None if w is None else grad for w, grad in zip((q_weight, k_weight), weight_grads)])
    return dqkv, *weight_grads
