"""timestep_features: a few thousand cosines and sines; lasts as long as its launch. F number of features."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.timestep_features import timestep_features
from sfd_kernels.triton.launch import launch, power_of_two, supported

LOG_10000 = tl.constexpr(math.log(10000))


@triton.jit
def _forward(t, features, HALF: tl.constexpr, BLOCK: tl.constexpr):
    clock = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < HALF
    # Triton's fp32 exp is an approximation through exp2: in fp64 the frequency is right to the last bit of fp32.
    frequency = tl.exp(index.to(tl.float64) * (-LOG_10000 / HALF)).to(tl.float32)
    angle = tl.load(t + clock).to(tl.float32) * frequency
    tl.store(features + clock * (2 * HALF) + index, tl.cos(angle), mask=inside)
    tl.store(features + clock * (2 * HALF) + HALF + index, tl.sin(angle), mask=inside)


@timestep_features.triton
def forward(t: Tensor, num_features: int) -> Tensor:
    if not supported(t) or num_features % 2:
        return NotImplemented
    t = t.contiguous()
    features = torch.empty((*t.shape, num_features), dtype=torch.float32, device=t.device)
    if features.numel():
        half = num_features // 2
        # One clock a program, one frequency a thread (F = 256: 128 of them on 4 warps).
        block = power_of_two(half)
        launch(_forward, t.numel(), t, features, HALF=half, BLOCK=block, num_warps=min(max(block // 32, 1), 8))
    return features
