"""masked_velocity_update: one pass over the sampler's state, in place, with every changing number read on the device.

B batch, C channels, K kept velocities.
"""

import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.masked_velocity_update import masked_velocity_update
from sfd_kernels.triton.launch import ceil_div, launch, packed_last, supported

# 1024 elements on 4 warps: 8 adjacent ones a thread, two 128-bit accesses of the fp32 state and one of a bf16 velocity.
# 384 programs for 32 latents of 48 x 16 x 16, all resident at once: the kernel lasts as long as its launch.
BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _update(
    x, base, history, v, v_guide, guidance, coefficients, write_slot, commit,
    total, per_sample, border, blocks, coefficients_row, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    within = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = within < per_sample
    # Channels are the outer dimension of a sample: texture is everything before the border.
    texture = within < border
    offsets = (tl.program_id(0) // blocks).to(tl.int64) * per_sample + within
    total = tl.cast(total, tl.int64)
    g = tl.load(v + offsets, mask=inside, other=0.0).to(tl.float32)
    if v_guide is not None:
        guide = tl.load(v_guide + offsets, mask=inside, other=0.0).to(tl.float32)
        weight = tl.where(texture, tl.load(guidance).to(tl.float32), tl.load(guidance + 1).to(tl.float32))
        g = tl.where(weight == 1.0, g, guide + weight * (g - guide))
    if base is not None:
        moved = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        moved = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    texture_row = coefficients
    semantic_row = coefficients + coefficients_row
    coefficient = tl.where(texture, tl.load(texture_row).to(tl.float32), tl.load(semantic_row).to(tl.float32))
    # A zero coefficient must not let a NaN through.
    moved += tl.where(coefficient == 0.0, 0.0, coefficient * g)
    for k in tl.static_range(KEPT):
        for_texture = tl.load(texture_row + 1 + k).to(tl.float32)
        for_semantic = tl.load(semantic_row + 1 + k).to(tl.float32)
        # A slot that neither stream uses is not read; the limit is one number, so the loads stay vectors.
        limit = tl.where((for_texture == 0.0) & (for_semantic == 0.0), 0, per_sample)
        kept = tl.load(history + k * total + offsets, mask=within < limit, other=0.0).to(tl.float32)
        coefficient = tl.where(texture, for_texture, for_semantic)
        moved += tl.where(coefficient == 0.0, 0.0, coefficient * kept)
    if write_slot is not None:
        slot = tl.load(write_slot)
        limit = tl.where((slot >= 0) & (slot < KEPT), per_sample, 0)
        tl.store(history + slot * total + offsets, g.to(history.dtype.element_ty), mask=within < limit)
    stored = moved.to(x.dtype.element_ty)
    tl.store(x + offsets, stored, mask=inside)
    if commit is not None:
        limit = tl.where(tl.load(commit) != 0, per_sample, 0)
        tl.store(base + offsets, stored.to(base.dtype.element_ty), mask=within < limit)


@masked_velocity_update.triton
def update(
    x: Tensor,
    base: Tensor | None,
    history: Tensor | None,
    v: Tensor,
    v_guide: Tensor | None,
    guidance: Tensor | None,
    coefficients: Tensor,
    write_slot: Tensor | None,
    commit: Tensor | None,
    num_texture_channels: int,
) -> None:
    state = [tensor for tensor in (x, base, history) if tensor is not None]
    small = [tensor for tensor in (guidance, coefficients) if tensor is not None]
    if not supported(*state, *small, v, v_guide) or x.dim() != 4 or not all(t.is_contiguous() for t in state):
        return NotImplemented
    if x.numel() == 0:
        return None
    v, v_guide = v.contiguous(), None if v_guide is None else v_guide.contiguous()
    guidance, coefficients = None if guidance is None else guidance.contiguous(), packed_last(coefficients)
    positions = x.shape[2] * x.shape[3]
    per_sample = x.shape[1] * positions
    blocks = ceil_div(per_sample, BLOCK)
    kept = 0 if history is None else history.shape[0]
    launch(
        _update, len(x) * blocks, x, base, history, v, v_guide, guidance, coefficients,
        write_slot if kept else None, None if base is None else commit,
        x.numel(), per_sample, num_texture_channels * positions, blocks, coefficients.stride(0),
        KEPT=kept, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return None
