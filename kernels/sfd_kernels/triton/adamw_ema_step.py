"""adamw_ema_step: every tensor of the optimizer's state read once and written once, many tensors in one launch.

Pointers travel as kernel arguments, so a call allocates nothing, copies nothing to the device and can be captured.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.adamw_ema_step import adamw_ema_step
from sfd_kernels.triton.launch import ceil_div, launch, supported

# 64 tensors a launch: the 414 of XL take 7 launches. 6 pointers and 2 sizes of each are 3.5 of the 4 KB that kernel
# arguments may take.
TENSORS = 64
# 1024 elements on 4 warps: 8 adjacent ones a thread, two 128-bit accesses of each of four or five fp32 tensors and one
# of bf16 gradients: 9 loads in flight for each thread at 48 registers.
BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - beta^step. Near 0 the difference would cancel (1 - 0.999 keeps 14 bits): there the series of expm1."""
    y = step * log_beta
    series = 1.0 + y / 8.0
    for divisor in tl.static_range(7, 1, -1):
        series = 1.0 + y * series / divisor
    return tl.where(y > -0.25, -y * series, 1.0 - tl.exp(y))


@triton.jit
def _step(
    weights, grads, exp_avgs, exp_avg_sqs, emas, copies, sizes, starts, lr, ema_decay, step, grad_scale, skip,
    weight_decay, BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr, TENSORS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """sizes, in units of UNIT elements, and starts, the first program of each tensor, as `_plain` writes them."""
    # `weights`: Triton's generated launcher has a variable named params.
    program = tl.program_id(0)
    # The last tensor whose first block is not after this program.
    p_at, g_at, m_at, s_at = weights[0], grads[0], exp_avgs[0], exp_avg_sqs[0]
    ema_at = None if emas is None else emas[0]
    copy_at = None if copies is None else copies[0]
    size, start = sizes[0], starts[0]
    for i in tl.static_range(1, TENSORS):
        if 2 * program + 3 >= starts[i]:
            p_at, g_at, m_at, s_at = weights[i], grads[i], exp_avgs[i], exp_avg_sqs[i]
            if emas is not None:
                ema_at = emas[i]
            if copies is not None:
                copy_at = copies[i]
            size, start = sizes[i], starts[i]
    units = tl.where(tl.load(skip) == 0, (size - 3) // 2, 0)
    # A product with UNIT tells the compiler that no vector of that length crosses the end.
    offsets = (program - (start - 3) // 2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < units.to(tl.int64) * UNIT
    p = tl.load(p_at + offsets, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_at + offsets, mask=inside, other=0.0).to(tl.float32) * tl.load(grad_scale).to(tl.float32)
    m = tl.load(m_at + offsets, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(s_at + offsets, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(lr).to(tl.float32)
    count = tl.load(step).to(tl.float32)
    m = BETA1 * m + (1.0 - BETA1) * g
    s = BETA2 * s + (1.0 - BETA2) * g * g
    denominator = tl.sqrt(s) / tl.sqrt(_one_minus_power(LOG_BETA2, count)) + EPS
    p = p * (1.0 - rate * weight_decay) - rate / _one_minus_power(LOG_BETA1, count) * m / denominator
    tl.store(p_at + offsets, p.to(p_at.dtype.element_ty), mask=inside)
    tl.store(m_at + offsets, m.to(m_at.dtype.element_ty), mask=inside)
    tl.store(s_at + offsets, s.to(s_at.dtype.element_ty), mask=inside)
    if emas is not None:
        decay = tl.load(ema_decay).to(tl.float32)
        ema = tl.load(ema_at + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(ema_at + offsets, (decay * ema + (1.0 - decay) * p).to(ema_at.dtype.element_ty), mask=inside)
    if copies is not None:
        tl.store(copy_at + offsets, p.to(copy_at.dtype.element_ty), mask=inside)


def _plain(number: int) -> int:
    """A number inside a tuple such that Triton compiles no kernel of its own for it.

    It does so for 1 and for multiples of 16, and do_not_specialize does not reach into tuples: 2 n + 3 is neither.
    """
    return 2 * number + 3


def _is_aligned(tensor: Tensor) -> bool:
    """Whether 128-bit accesses may start at it; allocators align storages to more."""
    return tensor.storage_offset() * tensor.element_size() % 16 == 0


def _groups(columns: Sequence[Sequence[Tensor]]) -> Iterator[tuple[int, list[tuple[Tensor, ...]]]]:
    """(UNIT, rows): at most TENSORS rows (param, grad, ...) that one compiled kernel serves.

    Those are rows of the same dtypes and alignments, all of sizes that 8 divides (UNIT 8) or not (UNIT 1): one group
    for a whole network, unless its gradients are views of something. Empty tensors are left out.
    """
    buckets: dict[tuple, list[tuple[Tensor, ...]]] = {}
    for row in zip(*columns):
        if row[0].numel():
            unit = 8 if row[0].numel() % 8 == 0 else 1
            key = unit, *[(tensor.dtype, _is_aligned(tensor)) for tensor in row]
            buckets.setdefault(key, []).append(row)
    for (unit, *_), rows in buckets.items():
        for first in range(0, len(rows), TENSORS):
            yield unit, rows[first : first + TENSORS]


@adamw_ema_step.triton
def update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    lr: Tensor,
    ema_decay: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    columns = [column for column in (params, grads, exp_avgs, exp_avg_sqs, emas, copies) if column]
    tensors = [tensor for column in columns for tensor in column]
    if not supported(*tensors) or not all(tensor.is_contiguous() for tensor in tensors):
        return NotImplemented
    meta: dict[str, Any] = {"BETA1": beta1, "BETA2": beta2, "EPS": eps, "TENSORS": TENSORS, "BLOCK": BLOCK}
    meta |= {"LOG_BETA1": math.log(max(beta1, 1e-38)), "LOG_BETA2": math.log(max(beta2, 1e-38))}
    for unit, rows in _groups(columns):
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + ceil_div(row[0].numel(), BLOCK))
        num_programs = starts.pop()
        # One compiled kernel whatever their number: the rest repeats the last tensor and starts where no program is.
        padding = TENSORS - len(rows)
        sizes = tuple(map(_plain, [row[0].numel() // unit for row in rows] + [0] * padding))
        starts = tuple(map(_plain, starts + [num_programs] * padding))
        pointers = list(zip(*rows, *[rows[-1]] * padding))
        ema = pointers[4] if emas else None
        copy = pointers[-1] if copies else None
        launch(
            _step, num_programs, *pointers[:4], ema, copy, sizes, starts, lr, ema_decay, step, grad_scale, skip,
            weight_decay, **meta, UNIT=unit, num_warps=NUM_WARPS,
        )  # fmt: skip
    return None
