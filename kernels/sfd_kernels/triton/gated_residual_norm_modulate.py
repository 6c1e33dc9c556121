"""gated_residual_norm_modulate and its backward: one read and one write of each (B, N, D) tensor.

B batch, N tokens, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.gated_residual_norm_modulate import (
    gated_residual_norm_modulate,
    gated_residual_norm_modulate_backward,
)
from sfd_kernels.triton.launch import ceil_div, launch, packed_last, supported
from sfd_kernels.triton.modulation_gradients import modulation_gradients
from sfd_kernels.triton.rows import row_tile, rows_per_program


@triton.jit
def _forward(
    x, branch, gate, weight, shift, scale, x_new, y,
    x_sample, x_row, branch_sample, branch_row, gate_sample, shift_sample, scale_sample,
    tokens, splits, rows_per_program, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits) * rows_per_program
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gates = tl.load(gate + sample * gate_sample + columns, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) * (
        1.0 + tl.load(scale + sample * scale_sample + columns, mask=inside, other=0.0).to(tl.float32)
    )
    if shift is not None:
        offset = tl.load(shift + sample * shift_sample + columns, mask=inside, other=0.0).to(tl.float32)
    x += sample * x_sample
    branch += sample * branch_sample
    x_new += sample * tokens * WIDTH
    y += sample * tokens * WIDTH
    last = tl.minimum(first + rows_per_program, tokens)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < last)[:, None] & inside[None, :]
        values = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        added = tl.load(branch + rows[:, None] * branch_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        stored = (values + gates[None, :] * added).to(x_new.dtype.element_ty)
        target = rows[:, None] * WIDTH + columns[None, :]
        tl.store(x_new + target, stored, mask=valid)
        values = stored.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(values * values, 1) / WIDTH + eps)
        values = values * rstd[:, None] * gain[None, :]
        if shift is not None:
            values += offset[None, :]
        tl.store(y + target, values.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _backward(
    dx_new, dy, x_new, branch, gate, weight, scale, dx, dbranch, partials,
    dx_new_sample, dx_new_row, dy_sample, dy_row, x_sample, x_row, branch_sample, branch_row,
    gate_sample, scale_sample, tokens, splits, rows_per_program, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits) * rows_per_program
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gates = tl.load(gate + sample * gate_sample + columns, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) * (
        1.0 + tl.load(scale + sample * scale_sample + columns, mask=inside, other=0.0).to(tl.float32)
    )
    products = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    gate_sums = tl.zeros((BLOCK,), tl.float32)
    dx_new += sample * dx_new_sample
    dy += sample * dy_sample
    x_new += sample * x_sample
    branch += sample * branch_sample
    dx += sample * tokens * WIDTH
    dbranch += sample * tokens * WIDTH
    last = tl.minimum(first + rows_per_program, tokens)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < last)[:, None] & inside[None, :]
        hat = tl.load(x_new + rows[:, None] * x_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        grad = tl.load(dy + rows[:, None] * dy_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        result = tl.load(dx_new + rows[:, None] * dx_new_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        added = tl.load(branch + rows[:, None] * branch_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(hat * hat, 1) / WIDTH + eps)[:, None]
        hat *= rstd
        products += tl.sum(grad * hat, 0)
        sums += tl.sum(grad, 0)
        grad *= gain[None, :]
        mean = (tl.sum(grad * hat, 1) / WIDTH)[:, None]
        result += rstd * (grad - hat * mean)
        gate_sums += tl.sum(added * result, 0)
        target = rows[:, None] * WIDTH + columns[None, :]
        tl.store(dx + target, result.to(dx.dtype.element_ty), mask=valid)
        tl.store(dbranch + target, (gates[None, :] * result).to(dbranch.dtype.element_ty), mask=valid)
    partials += tl.program_id(0).to(tl.int64) * (3 * WIDTH)
    tl.store(partials + columns, products, mask=inside)
    tl.store(partials + WIDTH + columns, sums, mask=inside)
    tl.store(partials + 2 * WIDTH + columns, gate_sums, mask=inside)


@gated_residual_norm_modulate.triton
def forward(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if not supported(x, branch, gate, weight, shift, scale):
        return NotImplemented
    batch, tokens, width = x.shape
    x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=scale.dtype, device=x.device)
    if x.numel() == 0:
        return x_new, y
    x, branch, gate, scale = packed_last(x), packed_last(branch), packed_last(gate), packed_last(scale)
    weight, shift = weight.contiguous(), None if shift is None else packed_last(shift)
    # As rms_norm_modulate; two inputs, so one stage less keeps as many bytes in flight. Four vectors for 32 rows of
    # four tensors: 2.8 % more bytes.
    tile = row_tile(width, rows=4, stages=3 if x.element_size() == 2 else 2)
    rows = rows_per_program(batch, tokens, most=32)
    splits = ceil_div(tokens, rows)
    launch(
        _forward, batch * splits, x, branch, gate, weight, shift, scale, x_new, y,
        x.stride(0), x.stride(1), branch.stride(0), branch.stride(1), gate.stride(0),
        0 if shift is None else shift.stride(0), scale.stride(0), tokens, splits, rows, eps,
        WIDTH=width, BLOCK=tile.BLOCK, ROWS=tile.ROWS, STAGES=tile.STAGES, num_warps=tile.num_warps,
    )  # fmt: skip
    return x_new, y


@gated_residual_norm_modulate_backward.triton
def backward(
    dx_new: Tensor, dy: Tensor, x_new: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not supported(dx_new, dy, x_new, branch, gate, weight, scale) or x_new.numel() == 0:
        return NotImplemented
    batch, tokens, width = x_new.shape
    dx_new, dy, x_new, branch = packed_last(dx_new), packed_last(dy), packed_last(x_new), packed_last(branch)
    gate, scale, weight = packed_last(gate), packed_last(scale), weight.contiguous()
    dx = torch.empty(x_new.shape, dtype=x_new.dtype, device=x_new.device)
    dbranch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    # 2 rows, 16 values of each of four inputs for each thread, held to 128 registers: two programs of 8 warps an SM.
    # 4-byte rows need 2 stages for that (3: 177 registers, or spills); 55 to 74 KB in flight on an SM.
    tile = row_tile(width, rows=2, stages=3 if x_new.element_size() == 2 else 2)
    # Three fp32 sums for each program, stored and read again: 7.8 % more bytes at 32 rows of all-bf16.
    rows = rows_per_program(batch, tokens, most=32)
    splits = ceil_div(tokens, rows)
    partials = torch.empty((batch * splits, 3, width), dtype=torch.float32, device=x_new.device)
    launch(
        _backward, batch * splits, dx_new, dy, x_new, branch, gate, weight, scale, dx, dbranch, partials,
        dx_new.stride(0), dx_new.stride(1), dy.stride(0), dy.stride(1), x_new.stride(0), x_new.stride(1),
        branch.stride(0), branch.stride(1), gate.stride(0), scale.stride(0), tokens, splits, rows, eps,
        WIDTH=width, BLOCK=tile.BLOCK, ROWS=tile.ROWS, STAGES=tile.STAGES, num_warps=tile.num_warps,
        maxnreg=128,
    )  # fmt: skip
    dweight, dshift, dscale, dgate = modulation_gradients(partials, weight, scale, gate_dtype=gate.dtype)
    return dx, dbranch, dgate, dweight, dshift, dscale
