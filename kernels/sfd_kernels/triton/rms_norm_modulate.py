"""rms_norm_modulate and its backward: one read of x (and dy), one write of y (or dx). B batch, N tokens, D width."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.rms_norm_modulate import rms_norm_modulate, rms_norm_modulate_backward
from sfd_kernels.triton.launch import ceil_div, launch, packed_last, supported
from sfd_kernels.triton.modulation_gradients import modulation_gradients
from sfd_kernels.triton.rows import row_tile, rows_per_program


@triton.jit
def _forward(
    x, weight, shift, scale, y,
    x_sample, x_row, shift_sample, scale_sample, tokens, splits, rows_per_program, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits) * rows_per_program
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) * (
        1.0 + tl.load(scale + sample * scale_sample + columns, mask=inside, other=0.0).to(tl.float32)
    )
    if shift is not None:
        offset = tl.load(shift + sample * shift_sample + columns, mask=inside, other=0.0).to(tl.float32)
    x += sample * x_sample
    y += sample * tokens * WIDTH
    last = tl.minimum(first + rows_per_program, tokens)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < last)[:, None] & inside[None, :]
        values = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(values * values, 1) / WIDTH + eps)
        values = values * rstd[:, None] * gain[None, :]
        if shift is not None:
            values += offset[None, :]
        tl.store(y + rows[:, None] * WIDTH + columns[None, :], values.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _backward(
    dy, x, weight, scale, dx, partials,
    dy_sample, dy_row, x_sample, x_row, scale_sample, tokens, splits, rows_per_program, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits) * rows_per_program
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) * (
        1.0 + tl.load(scale + sample * scale_sample + columns, mask=inside, other=0.0).to(tl.float32)
    )
    products = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    dy += sample * dy_sample
    x += sample * x_sample
    dx += sample * tokens * WIDTH
    last = tl.minimum(first + rows_per_program, tokens)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < last)[:, None] & inside[None, :]
        hat = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        grad = tl.load(dy + rows[:, None] * dy_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(hat * hat, 1) / WIDTH + eps)[:, None]
        hat *= rstd
        products += tl.sum(grad * hat, 0)
        sums += tl.sum(grad, 0)
        grad *= gain[None, :]
        mean = (tl.sum(grad * hat, 1) / WIDTH)[:, None]
        result = rstd * (grad - hat * mean)
        tl.store(dx + rows[:, None] * WIDTH + columns[None, :], result.to(dx.dtype.element_ty), mask=valid)
    partials += tl.program_id(0).to(tl.int64) * (2 * WIDTH)
    tl.store(partials + columns, products, mask=inside)
    tl.store(partials + WIDTH + columns, sums, mask=inside)


@rms_norm_modulate.triton
def forward(x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> Tensor:
    if not supported(x, weight, shift, scale):
        return NotImplemented
    batch, tokens, width = x.shape
    y = torch.empty(x.shape, dtype=scale.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight, scale = packed_last(x), weight.contiguous(), packed_last(scale)
    shift = None if shift is None else packed_last(shift)
    # 4 rows: 32 values for each thread, 64 registers. weight, scale and shift are read again for every 32 rows: 4.3 %
    # more bytes. Two programs an SM keep 55 KB (2-byte elements, 4 stages) or 74 KB (4-byte, 3 stages) of loads in
    # flight.
    tile = row_tile(width, rows=4, stages=4 if x.element_size() == 2 else 3)
    rows = rows_per_program(batch, tokens, most=32)
    splits = ceil_div(tokens, rows)
    launch(
        _forward, batch * splits, x, weight, shift, scale, y,
        x.stride(0), x.stride(1), 0 if shift is None else shift.stride(0), scale.stride(0), tokens, splits, rows, eps,
        WIDTH=width, BLOCK=tile.BLOCK, ROWS=tile.ROWS, STAGES=tile.STAGES, num_warps=tile.num_warps,
    )  # fmt: skip
    return y


@rms_norm_modulate_backward.triton
def backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not supported(dy, x, weight, scale) or x.numel() == 0:
        return NotImplemented
    batch, tokens, width = x.shape
    dy, x, weight, scale = packed_last(dy), packed_last(x), weight.contiguous(), packed_last(scale)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # 2 rows: at most 128 registers, so two programs of 8 warps fit an SM; 4 rows need 150 to 175 (bf16 spills if held
    # to 128). 37 KB (bf16) to 74 KB (fp32) in flight on an SM.
    tile = row_tile(width, rows=2, stages=3)
    # Two fp32 sums for each program, stored and read again: 10.4 % more bytes at 32 rows of all-bf16, so 40 there.
    rows = rows_per_program(batch, tokens, most=32 if x.element_size() + dy.element_size() > 4 else 40)
    splits = ceil_div(tokens, rows)
    partials = torch.empty((batch * splits, 2, width), dtype=torch.float32, device=x.device)
    launch(
        _backward, batch * splits, dy, x, weight, scale, dx, partials,
        dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), scale.stride(0), tokens, splits, rows, eps,
        WIDTH=width, BLOCK=tile.BLOCK, ROWS=tile.ROWS, STAGES=tile.STAGES, num_warps=tile.num_warps,
    )  # fmt: skip
    dweight, dshift, dscale, _ = modulation_gradients(partials, weight, scale, gate_dtype=None)
    return dx, dweight, dshift, dscale
