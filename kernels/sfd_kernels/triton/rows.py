"""Tiles for kernels that reduce along rows of width D: how many columns, rows, warps and stages a program takes.

B batch, N tokens, D width. A program owns consecutive rows of one sample, so the sample's shift, scale and gate are
read once into registers and the column sums of the backward pass stay there; it walks its rows in tiles of a few, the
loads of the next tile in flight (cp.async) while the present one is computed.
"""

import functools
from dataclasses import dataclass

from sfd_kernels.triton.launch import ceil_div, power_of_two


@dataclass(frozen=True)
class RowTile:
    """BLOCK columns (a power of two) x ROWS rows at a time, `num_warps` warps, STAGES tiles of loads in flight."""

    BLOCK: int
    ROWS: int
    STAGES: int
    num_warps: int


@functools.cache
def row_tile(width: int, rows: int, stages: int) -> RowTile:
    """One block covers the row; a thread owns 8 columns: one 128-bit access in bf16, two in fp32.

    D = 1152 (XL) leaves 44 % of a block of 2048 idle, 768 (B) and 1536 (XXL) 25 %. Splitting 1152 into 1024 + 128 or
    5 x 256 was tried: the forward then issues a third fewer instructions (92 issue slots of an SM per row against 140,
    where the memory leaves 355 at 3.0 TB/s), but the backward saves nothing (226 to 286 against 286), holds twice the
    registers (254 against 128) and converts layouts 11 times instead of 3. So: one block.
    """
    block = max(power_of_two(width), 64)
    return RowTile(block, rows, stages, num_warps=min(max(block // 256, 1), 16))


@functools.cache
def rows_per_program(batch: int, tokens: int, most: int) -> int:
    """`most` rows of a sample for each program, fewer where the grid would have under 216 programs; at least 8.

    216 are two for each of the 108 multiprocessors of an A100 (H100 132, B200 148). `most` is where reading the (D,)
    vectors again in every program, and in the backward pass storing partial sums, stays below the bound on bytes.
    """
    return next((rows for rows in range(most, 8, -8) if batch * ceil_div(tokens, rows) >= 216), 8)
