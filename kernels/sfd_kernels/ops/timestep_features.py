"""Sinusoidal features of a clock. F number of features."""

import math

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype
from sfd_kernels.registry import Op


def timestep_features(t: Tensor, num_features: int) -> Tensor:
    """[cos(t f_0), ..., cos(t f_{F/2-1}), sin(t f_0), ...] with f_i = exp(-ln(10000) i / (F/2)).

    t of any shape, in [0, 1] (not scaled by 1000): both clocks at once as (2, B). Returns (*t.shape, F), float32, or
    float64 for float64 t. Raises ValueError for an odd F. Source: LightningDiT's TimestepEmbedder (docs/METHOD.md 3).
    """
    if num_features % 2:
        raise ValueError(f"num_features is {num_features}; it must be even: one half cosines, the other sines")
    dtype = accumulation_dtype(t)
    half = num_features // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angles = t.to(dtype)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _examples(make, size):
    yield "both clocks", (make.uniform(2, size.batch), 10 if size.is_tiny else 256)
    if size.is_tiny:
        yield "one clock", (make.uniform(size.batch), 256)


timestep_features = Op(
    timestep_features, examples=_examples, flops=lambda t, num_features: 20 * t.numel() * num_features
)
