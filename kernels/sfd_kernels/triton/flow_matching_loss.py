"""flow_matching_loss and its backward: the target x1 - x0 exists in registers only. B batch, C channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.flow_matching_loss import flow_matching_loss, flow_matching_loss_backward
from sfd_kernels.triton.inverse_norm import inverse_norm
from sfd_kernels.triton.launch import ceil_div, launch, power_of_two, supported

# Forward: one program for a sample, so one kernel and no second stage; the loss lasts as long as its launch. 16
# channels x 256 positions on 16 warps: 8 adjacent positions a thread, the three channel steps of C = 48 unrolled, so
# that all loads go out at once.
FORWARD_CHANNELS, FORWARD_POSITIONS, FORWARD_WARPS = 16, 256, 16
# Backward: all channels of a few positions stay in registers between the dot products and the gradient: 64 x 32 of C =
# 48 on 4 warps (16 values of prediction and of target a thread), 256 programs at batch 32.
BACKWARD_ELEMENTS, BACKWARD_WARPS = 2048, 4


@triton.jit
def _forward(
    pred, x0, x1, velocity, cosine, positions, num_texture, semantic_weight,
    CHANNELS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    pred += sample * CHANNELS * positions
    x0 += sample * CHANNELS * positions
    x1 += sample * CHANNELS * positions
    squares = tl.zeros((STEP, BLOCK), tl.float32)
    distances = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < positions
        pp = tl.zeros((STEP, BLOCK), tl.float32)
        vv = tl.zeros((STEP, BLOCK), tl.float32)
        pv = tl.zeros((STEP, BLOCK), tl.float32)
        for first in tl.static_range(0, CHANNELS, STEP):
            channels = first + tl.arange(0, STEP)
            valid = (channels < CHANNELS)[:, None] & inside[None, :]
            offsets = channels[:, None] * positions + position[None, :]
            p = tl.load(pred + offsets, mask=valid, other=0.0).to(tl.float32)
            v = tl.load(x1 + offsets, mask=valid, other=0.0).to(tl.float32)
            v -= tl.load(x0 + offsets, mask=valid, other=0.0).to(tl.float32)
            pp += p * p
            vv += v * v
            pv += p * v
            squares += tl.where(channels < num_texture, 1.0, semantic_weight)[:, None] * (p - v) * (p - v)
        cos = tl.sum(pv, 0) * inverse_norm(tl.sum(pp, 0)) * inverse_norm(tl.sum(vv, 0))
        distances += tl.where(inside, 1.0 - cos, 0.0)
    tl.store(velocity + sample, tl.sum(tl.sum(squares, 0), 0) / (CHANNELS * positions))
    tl.store(cosine + sample, tl.sum(distances, 0) / positions)


@triton.jit
def _backward(
    d_velocity, d_cosine, pred, x0, x1, dpred, positions, blocks, num_texture, semantic_weight,
    CHANNELS: tl.constexpr, CHANNEL_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, CHANNEL_BLOCK)
    valid = (channels < CHANNELS)[:, None] & (position < positions)[None, :]
    offsets = sample * CHANNELS * positions + channels[:, None] * positions + position[None, :]
    p = tl.load(pred + offsets, mask=valid, other=0.0).to(tl.float32)
    v = tl.load(x1 + offsets, mask=valid, other=0.0).to(tl.float32)
    v -= tl.load(x0 + offsets, mask=valid, other=0.0).to(tl.float32)
    inverse_p = inverse_norm(tl.sum(p * p, 0))
    inverse_v = inverse_norm(tl.sum(v * v, 0))
    cos = tl.sum(p * v, 0) * inverse_p * inverse_v
    scale = tl.load(d_cosine + sample).to(tl.float32) / positions
    along_v = scale * inverse_p * inverse_v
    along_p = scale * cos * inverse_p * inverse_p
    weight = tl.where(channels < num_texture, 1.0, semantic_weight)
    weight *= 2.0 * tl.load(d_velocity + sample).to(tl.float32) / (CHANNELS * positions)
    grad = weight[:, None] * (p - v) - (v * along_v[None, :] - p * along_p[None, :])
    tl.store(dpred + offsets, grad.to(dpred.dtype.element_ty), mask=valid)


@flow_matching_loss.triton
def forward(
    pred: Tensor, x0: Tensor, x1: Tensor, num_texture_channels: int, semantic_weight: float
) -> tuple[Tensor, Tensor]:
    if not supported(pred, x0, x1) or pred.numel() == 0:
        return NotImplemented
    pred, x0, x1 = pred.contiguous(), x0.contiguous(), x1.contiguous()
    batch, channels, height, width = pred.shape
    velocity, cosine = (torch.empty(batch, dtype=torch.float32, device=pred.device) for _ in range(2))
    launch(
        _forward, batch, pred, x0, x1, velocity, cosine, height * width, num_texture_channels, float(semantic_weight),
        CHANNELS=channels, STEP=FORWARD_CHANNELS, BLOCK=FORWARD_POSITIONS, num_warps=FORWARD_WARPS,
    )  # fmt: skip
    return velocity, cosine


@flow_matching_loss_backward.triton
def backward(
    d_velocity: Tensor,
    d_cosine: Tensor,
    pred: Tensor,
    x0: Tensor,
    x1: Tensor,
    num_texture_channels: int,
    semantic_weight: float,
) -> Tensor:
    if not supported(d_velocity, d_cosine, pred, x0, x1) or pred.numel() == 0:
        return NotImplemented
    d_velocity, d_cosine = d_velocity.contiguous(), d_cosine.contiguous()
    pred, x0, x1 = pred.contiguous(), x0.contiguous(), x1.contiguous()
    batch, channels, height, width = pred.shape
    dpred = torch.empty_like(pred)
    channel_block = power_of_two(channels)
    block = max(BACKWARD_ELEMENTS // channel_block, 8)
    blocks = ceil_div(height * width, block)
    launch(
        _backward, batch * blocks, d_velocity, d_cosine, pred, x0, x1, dpred, height * width, blocks,
        num_texture_channels, float(semantic_weight),
        CHANNELS=channels, CHANNEL_BLOCK=channel_block, BLOCK=block, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return dpred
