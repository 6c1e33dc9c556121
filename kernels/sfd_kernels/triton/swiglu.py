"""swiglu and its backward: elementwise over rows of the packed projection. H hidden width."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.swiglu import swiglu, swiglu_backward
from sfd_kernels.triton.launch import ceil_div, launch, supported

# 1024 columns divide the widths of XL (3072), XXL (4096) and B (2048). On 4 warps a thread owns 8 adjacent columns: one
# 128-bit access in bf16, two in fp32. 2 rows: 4 (backward 6) loads in flight for each thread at under 64 registers, so
# over 64 KB on a multiprocessor. HIDDEN is a constant: of an odd multiple of 2 (2730 of L, 4778 of 1p6B) the compiler
# then knows the alignment that `up` has, 4 bytes, and uses 32-bit accesses; as a run-time argument they were 16-bit.
COLUMNS, ROWS, NUM_WARPS = 1024, 2, 4


@triton.jit
def _forward(x, y, num_rows, blocks, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    valid = (rows < num_rows)[:, None] & (columns < HIDDEN)[None, :]
    source = x + rows[:, None] * (2 * HIDDEN) + columns[None, :]
    gate = tl.load(source, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(source + HIDDEN, mask=valid, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(y + rows[:, None] * HIDDEN + columns[None, :], result.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _backward(dy, x, dx, num_rows, blocks, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    valid = (rows < num_rows)[:, None] & (columns < HIDDEN)[None, :]
    offsets = rows[:, None] * (2 * HIDDEN) + columns[None, :]
    gate = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(x + offsets + HIDDEN, mask=valid, other=0.0).to(tl.float32)
    grad = tl.load(dy + rows[:, None] * HIDDEN + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = grad * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dx + offsets, d_gate.to(dx.dtype.element_ty), mask=valid)
    tl.store(dx + offsets + HIDDEN, (grad * gate * s).to(dx.dtype.element_ty), mask=valid)


def _grid(num_rows: int, hidden: int) -> tuple[int, int]:
    blocks = ceil_div(hidden, COLUMNS)
    return ceil_div(num_rows, ROWS) * blocks, blocks


@swiglu.triton
def forward(x: Tensor) -> Tensor:
    if not supported(x):
        return NotImplemented
    x = x.contiguous()
    hidden = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], hidden), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    num_rows = y.numel() // hidden
    num_programs, blocks = _grid(num_rows, hidden)
    meta = {"HIDDEN": hidden, "COLUMNS": COLUMNS, "ROWS": ROWS, "num_warps": NUM_WARPS}
    launch(_forward, num_programs, x, y, num_rows, blocks, **meta)
    return y


@swiglu_backward.triton
def backward(dy: Tensor, x: Tensor) -> Tensor:
    if not supported(dy, x):
        return NotImplemented
    dy, x = dy.contiguous(), x.contiguous()
    hidden = x.shape[-1] // 2
    dx = torch.empty_like(x)
    if dx.numel() == 0:
        return dx
    num_rows = dy.numel() // hidden
    num_programs, blocks = _grid(num_rows, hidden)
    meta = {"HIDDEN": hidden, "COLUMNS": COLUMNS, "ROWS": ROWS, "num_warps": NUM_WARPS}
    launch(_backward, num_programs, dy, x, dx, num_rows, blocks, **meta)
    return dx
