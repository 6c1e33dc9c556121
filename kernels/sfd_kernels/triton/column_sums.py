"""Second stage of small reductions: sums over the rows of per-program partial sums, in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.triton.launch import ceil_div, launch


@triton.jit
def _column_sums(partials, first, second, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partials (rows, 2 WIDTH): the first half sums to `first` (WIDTH,), the second to `second`; None is skipped."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < 2 * WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < num_rows)[:, None] & inside[None, :]
        total += tl.load(partials + rows[:, None] * (2 * WIDTH) + columns[None, :], mask=valid, other=0.0)
    sums = tl.sum(total, 0)
    if first is not None:
        tl.store(first + columns, sums.to(first.dtype.element_ty), mask=columns < WIDTH)
    if second is not None:
        tl.store(second + columns - WIDTH, sums.to(second.dtype.element_ty), mask=inside & (columns >= WIDTH))


def column_sums(partials: Tensor, outputs: list[Tensor | None]) -> None:
    """Writes the sums over the rows of partials (R, 2 W), fp32, to two outputs (W,) of any floating dtype."""
    num_rows, columns = partials.shape
    # 16 columns (64 bytes) and 512 rows a step: 32 values for each of 256 threads, so that 2048 rows of the qk backward
    # take 4 steps of memory latency; 9 programs at d = 72.
    launch(
        _column_sums, ceil_div(columns, 16), partials, *outputs, num_rows,
        WIDTH=columns // 2, ROWS=512, COLUMNS=16, num_warps=8,
    )  # fmt: skip
