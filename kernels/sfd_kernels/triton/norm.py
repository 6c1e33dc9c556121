"""The norms and their backward passes, with a gated branch added before the norm or without: one read of each input and
one write of each output. B batch, N tokens, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.triton.launch import ceil_div, launch, packed_last, supported
from sfd_kernels.triton.modulation_gradients import modulation_gradients
from sfd_kernels.triton.rows import row_tile, rows_per_program


@triton.jit
def _vector(pointer, columns, inside):
    return tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)


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
    gain = _vector(weight, columns, inside) * (1.0 + _vector(scale + sample * scale_sample, columns, inside))
    if shift is not None:
        offset = _vector(shift + sample * shift_sample, columns, inside)
    x += sample * x_sample
    y += sample * tokens * WIDTH
    if branch is not None:
        gates = _vector(gate + sample * gate_sample, columns, inside)
        branch += sample * branch_sample
        x_new += sample * tokens * WIDTH
    last = tl.minimum(first + rows_per_program, tokens)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < last)[:, None] & inside[None, :]
        target = rows[:, None] * WIDTH + columns[None, :]
        values = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        if branch is not None:
            added = tl.load(branch + rows[:, None] * branch_row + columns[None, :], mask=valid, other=0.0)
            stored = (values + gates[None, :] * added.to(tl.float32)).to(x_new.dtype.element_ty)
            tl.store(x_new + target, stored, mask=valid)
            values = stored.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(values * values, 1) / WIDTH + eps)
        values = values * rstd[:, None] * gain[None, :]
        if shift is not None:
            values += offset[None, :]
        tl.store(y + target, values.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _backward(
    dy, dx_new, x, branch, gate, weight, scale, dx, dbranch, partials,
    dy_sample, dy_row, dx_new_sample, dx_new_row, x_sample, x_row, branch_sample, branch_row,
    gate_sample, scale_sample, tokens, splits, rows_per_program, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """x is what was normalised; partials (programs, SUMS, D): sums over the rows of dy x_hat, dy and branch dx."""
    sample = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits) * rows_per_program
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gain = _vector(weight, columns, inside) * (1.0 + _vector(scale + sample * scale_sample, columns, inside))
    products = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    gate_sums = tl.zeros((BLOCK,), tl.float32)
    dy += sample * dy_sample
    x += sample * x_sample
    dx += sample * tokens * WIDTH
    if branch is not None:
        gates = _vector(gate + sample * gate_sample, columns, inside)
        dx_new += sample * dx_new_sample
        branch += sample * branch_sample
        dbranch += sample * tokens * WIDTH
    last = tl.minimum(first + rows_per_program, tokens)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < last)[:, None] & inside[None, :]
        target = rows[:, None] * WIDTH + columns[None, :]
        hat = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        grad = tl.load(dy + rows[:, None] * dy_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        if branch is not None:
            passed = tl.load(dx_new + rows[:, None] * dx_new_row + columns[None, :], mask=valid, other=0.0)
            added = tl.load(branch + rows[:, None] * branch_row + columns[None, :], mask=valid, other=0.0)
        rstd = tl.rsqrt(tl.sum(hat * hat, 1) / WIDTH + eps)[:, None]
        hat *= rstd
        products += tl.sum(grad * hat, 0)
        sums += tl.sum(grad, 0)
        grad *= gain[None, :]
        mean = (tl.sum(grad * hat, 1) / WIDTH)[:, None]
        result = rstd * (grad - hat * mean)
        if branch is not None:
            result += passed.to(tl.float32)
            gate_sums += tl.sum(added.to(tl.float32) * result, 0)
            tl.store(dbranch + target, (gates[None, :] * result).to(dbranch.dtype.element_ty), mask=valid)
        tl.store(dx + target, result.to(dx.dtype.element_ty), mask=valid)
    partials += tl.program_id(0).to(tl.int64) * (SUMS * WIDTH)
    tl.store(partials + columns, products, mask=inside)
    tl.store(partials + WIDTH + columns, sums, mask=inside)
    if branch is not None:
        tl.store(partials + 2 * WIDTH + columns, gate_sums, mask=inside)


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else packed_last(tensor)


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first `count` strides; zeros of a tensor that is not there."""
    return (0,) * count if tensor is None else tensor.stride()[:count]


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor | None, Tensor]:
    """(x_new, y): x_new is None without a branch."""
    if not supported(x, branch, gate, weight, shift, scale):
        return NotImplemented
    batch, tokens, width = x.shape
    x_new = None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=scale.dtype, device=x.device)
    if y.numel() == 0:
        return x_new, y
    x, branch, gate, weight, shift, scale = map(_packed, (x, branch, gate, weight, shift, scale))
    # 4 rows: 32 values for each thread, 64 registers. weight, scale and shift are read again for every 32 rows: 4.3 %
    # more bytes (with a branch 2.8 %: four vectors for 32 rows of four tensors). Two programs an SM keep 55 KB (2-byte
    # elements, 4 stages) or 74 KB (4-byte, 3 stages) of loads in flight; two inputs need one stage less for that.
    stages = (4 if x.element_size() == 2 else 3) - (branch is not None)
    tile = row_tile(width, rows=4, stages=stages)
    rows = rows_per_program(batch, tokens, most=32)
    splits = ceil_div(tokens, rows)
    launch(
        _forward, batch * splits, x, branch, gate, weight, shift, scale, x_new, y,
        *_strides(x, 2), *_strides(branch, 2), *_strides(gate, 1), *_strides(shift, 1), *_strides(scale, 1),
        tokens, splits, rows, eps,
        WIDTH=width, BLOCK=tile.BLOCK, ROWS=tile.ROWS, STAGES=tile.STAGES, num_warps=tile.num_warps,
    )  # fmt: skip
    return x_new, y


def backward(
    dx_new: Tensor | None,
    dy: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dgate, dweight, dshift, dscale), None for what there is not; x: what was normalised."""
    if not supported(dx_new, dy, x, branch, gate, weight, scale) or x.numel() == 0:
        return NotImplemented
    batch, tokens, width = x.shape
    dx_new, dy, x, branch, gate, weight, scale = map(_packed, (dx_new, dy, x, branch, gate, weight, scale))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbranch = None if branch is None else torch.empty(branch.shape, dtype=branch.dtype, device=x.device)
    # 2 rows: at most 128 registers, so two programs of 8 warps fit an SM; 4 rows need 150 to 175 (bf16 spills if held
    # to 128). 37 KB (bf16) to 74 KB (fp32) in flight on an SM. A branch makes four inputs: held to 128 registers, and
    # 4-byte rows need 2 stages for that (3: 177 registers, or spills).
    tile = row_tile(width, rows=2, stages=2 if branch is not None and x.element_size() == 4 else 3)
    # fp32 sums for each program, stored and read again: two are 10.4 % more bytes at 32 rows of all-bf16, so 40 there;
    # three beside a branch's tensors 7.8 %.
    wide = branch is not None or x.element_size() + dy.element_size() > 4
    rows = rows_per_program(batch, tokens, most=32 if wide else 40)
    splits, num_sums = ceil_div(tokens, rows), 2 if branch is None else 3
    partials = torch.empty((batch * splits, num_sums, width), dtype=torch.float32, device=x.device)
    launch(
        _backward, batch * splits, dy, dx_new, x, branch, gate, weight, scale, dx, dbranch, partials,
        *_strides(dy, 2), *_strides(dx_new, 2), *_strides(x, 2), *_strides(branch, 2), *_strides(gate, 1),
        *_strides(scale, 1), tokens, splits, rows, eps,
        WIDTH=width, BLOCK=tile.BLOCK, ROWS=tile.ROWS, STAGES=tile.STAGES, SUMS=num_sums, num_warps=tile.num_warps,
        **({} if branch is None else {"maxnreg": 128}),
    )  # fmt: skip
    gate_dtype = None if gate is None else gate.dtype
    dweight, dshift, dscale, dgate = modulation_gradients(partials, weight, scale, gate_dtype=gate_dtype)
    return dx, dbranch, dgate, dweight, dshift, dscale
