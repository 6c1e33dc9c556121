"""feature_alignment_loss and its backward: both tensors read once, row by row. B batch, N tokens, F features."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.feature_alignment_loss import feature_alignment_loss, feature_alignment_loss_backward
from sfd_kernels.triton.inverse_norm import inverse_norm
from sfd_kernels.triton.launch import ceil_div, launch, packed_last, supported
from sfd_kernels.triton.rows import row_tile, rows_per_program


@triton.jit
def _forward(
    pred, target, partials, pred_sample, pred_row, target_sample, target_row, tokens, splits, rows_per_program,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits) * rows_per_program
    last = tl.minimum(first + rows_per_program, tokens)
    columns = tl.arange(0, BLOCK)
    pred += sample * pred_sample
    target += sample * target_sample
    squares = tl.zeros((ROWS,), tl.float32)
    distances = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < last)[:, None] & (columns < WIDTH)[None, :]
        p = tl.load(pred + rows[:, None] * pred_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        t = tl.load(target + rows[:, None] * target_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        squares += tl.sum((p - t) * (p - t), 1)
        cos = tl.sum(p * t, 1) * inverse_norm(tl.sum(p * p, 1)) * inverse_norm(tl.sum(t * t, 1))
        distances += tl.where(rows < last, 1.0 - cos, 0.0)
    tl.store(partials + tl.program_id(0) * 2, tl.sum(squares, 0) / WIDTH)
    tl.store(partials + tl.program_id(0) * 2 + 1, tl.sum(distances, 0))


@triton.jit
def _means(partials, mse, cosine, batch, splits, tokens, SAMPLES: tl.constexpr):
    """Second stage: partials (B, S, 2) summed over the splits in order."""
    samples = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    squares = tl.zeros((SAMPLES,), tl.float32)
    distances = tl.zeros((SAMPLES,), tl.float32)
    for split in range(splits):
        at = partials + (samples * splits + split) * 2
        squares += tl.load(at, mask=samples < batch, other=0.0)
        distances += tl.load(at + 1, mask=samples < batch, other=0.0)
    tl.store(mse + samples, squares / tokens, mask=samples < batch)
    tl.store(cosine + samples, distances / tokens, mask=samples < batch)


@triton.jit
def _backward(
    d_mse, d_cos, pred, target, dpred, pred_sample, pred_row, target_sample, target_row, tokens, splits,
    rows_per_program,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits) * rows_per_program
    last = tl.minimum(first + rows_per_program, tokens)
    columns = tl.arange(0, BLOCK)
    mse_scale = 2.0 * tl.load(d_mse + sample).to(tl.float32) / (tokens * WIDTH)
    cos_scale = tl.load(d_cos + sample).to(tl.float32) / tokens
    pred += sample * pred_sample
    target += sample * target_sample
    dpred += sample * tokens * WIDTH
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < last)[:, None] & (columns < WIDTH)[None, :]
        p = tl.load(pred + rows[:, None] * pred_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        t = tl.load(target + rows[:, None] * target_row + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        inverse_p = inverse_norm(tl.sum(p * p, 1))
        inverse_t = inverse_norm(tl.sum(t * t, 1))
        cos = tl.sum(p * t, 1) * inverse_p * inverse_t
        along_t = cos_scale * inverse_p * inverse_t
        along_p = cos_scale * cos * inverse_p * inverse_p
        grad = mse_scale * (p - t) - (t * along_t[:, None] - p * along_p[:, None])
        tl.store(dpred + rows[:, None] * WIDTH + columns[None, :], grad.to(dpred.dtype.element_ty), mask=valid)


@feature_alignment_loss.triton
def forward(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if not supported(pred, target) or pred.numel() == 0:
        return NotImplemented
    batch, tokens, width = pred.shape
    pred, target = packed_last(pred), packed_last(target)
    mse, cosine = (torch.empty(batch, dtype=torch.float32, device=pred.device) for _ in range(2))
    # Nothing large is written and no vector is read again, so a program may be short: 16 rows, 512 programs at 8192
    # tokens.
    tile = row_tile(width, rows=4, stages=2 if pred.element_size() + target.element_size() == 8 else 3)
    rows = rows_per_program(batch, tokens, most=16)
    splits = ceil_div(tokens, rows)
    partials = torch.empty((batch * splits, 2), dtype=torch.float32, device=pred.device)
    launch(
        _forward, batch * splits, pred, target, partials, pred.stride(0), pred.stride(1), target.stride(0),
        target.stride(1), tokens, splits, rows,
        WIDTH=width, BLOCK=tile.BLOCK, ROWS=tile.ROWS, STAGES=tile.STAGES, num_warps=tile.num_warps,
    )  # fmt: skip
    # A lane a sample: a few thousand numbers in all.
    launch(_means, ceil_div(batch, 32), partials, mse, cosine, batch, splits, tokens, SAMPLES=32, num_warps=1)
    return mse, cosine


@feature_alignment_loss_backward.triton
def backward(d_mse: Tensor, d_cos: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    if not supported(d_mse, d_cos, pred, target) or pred.numel() == 0:
        return NotImplemented
    batch, tokens, width = pred.shape
    d_mse, d_cos, pred, target = d_mse.contiguous(), d_cos.contiguous(), packed_last(pred), packed_last(target)
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    # As the forward; both rows stay in registers between the dot products and the gradient.
    tile = row_tile(width, rows=4, stages=2 if pred.element_size() + target.element_size() == 8 else 3)
    rows = rows_per_program(batch, tokens, most=16)
    splits = ceil_div(tokens, rows)
    launch(
        _backward, batch * splits, d_mse, d_cos, pred, target, dpred, pred.stride(0), pred.stride(1), target.stride(0),
        target.stride(1), tokens, splits, rows,
        WIDTH=width, BLOCK=tile.BLOCK, ROWS=tile.ROWS, STAGES=tile.STAGES, num_warps=tile.num_warps,
    )  # fmt: skip
    return dpred
