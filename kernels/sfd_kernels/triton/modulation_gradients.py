"""Second stage of the norm backwards: partial column sums to the gradients of weight, shift, scale and gate.

B batch, D width, S splits of a sample's rows. No atomics: the order of every addition is fixed, two runs are bit-equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.triton.launch import ceil_div, launch


@triton.jit
def _reduce(
    partials, weight, scale, dweight, dshift, dscale, dgate, scale_sample, batch, splits,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SAMPLES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((SAMPLES, COLUMNS), tl.float32)
    for start in range(0, batch, SAMPLES):
        samples = start + tl.arange(0, SAMPLES).to(tl.int64)[:, None]
        valid = (samples < batch) & inside[None, :]
        products = tl.zeros((SAMPLES, COLUMNS), tl.float32)
        sums = tl.zeros((SAMPLES, COLUMNS), tl.float32)
        gates = tl.zeros((SAMPLES, COLUMNS), tl.float32)
        for split in range(splits):
            row = partials + (samples * splits + split) * (SUMS * WIDTH) + columns[None, :]
            products += tl.load(row, mask=valid, other=0.0)
            sums += tl.load(row + WIDTH, mask=valid, other=0.0)
            if SUMS == 3:
                gates += tl.load(row + 2 * WIDTH, mask=valid, other=0.0)
        target = samples * WIDTH + columns[None, :]
        tl.store(dscale + target, (gain * products).to(dscale.dtype.element_ty), mask=valid)
        tl.store(dshift + target, sums.to(dshift.dtype.element_ty), mask=valid)
        if SUMS == 3:
            tl.store(dgate + target, gates.to(dgate.dtype.element_ty), mask=valid)
        factor = 1.0 + tl.load(scale + samples * scale_sample + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        total += factor * products
    tl.store(dweight + columns, tl.sum(total, 0).to(dweight.dtype.element_ty), mask=inside)


def modulation_gradients(
    partials: Tensor, weight: Tensor, scale: Tensor, *, gate_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dweight (D,), dshift (B, D), dscale (B, D), dgate (B, D) or None) from per-program sums.

    partials (B * S, 2 or 3, D) fp32: A = sum of dy x_hat, sum of dy and, with a gate, sum of branch dx over the rows of
    a split. With A_b the sum over splits: dscale_b = weight A_b, dweight = sum_b (1 + scale_b) A_b.
    """
    batch, width = scale.shape
    dweight = torch.empty_like(weight)
    dshift, dscale = (torch.empty((batch, width), dtype=scale.dtype, device=scale.device) for _ in range(2))
    dgate = None if gate_dtype is None else torch.empty((batch, width), dtype=gate_dtype, device=scale.device)
    # 32 columns: 128-byte rows of partials and, at D = 1152, 36 programs; 32 samples a tile: 8 values for each thread.
    launch(
        _reduce, ceil_div(width, 32), partials, weight, scale, dweight, dshift, dscale, dgate,
        scale.stride(0), batch, partials.shape[0] // batch,
        WIDTH=width, COLUMNS=32, SAMPLES=32, SUMS=partials.shape[1], num_warps=4,
    )  # fmt: skip
    return dweight, dshift, dscale, dgate
