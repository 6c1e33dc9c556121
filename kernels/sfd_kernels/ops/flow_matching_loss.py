"""Velocity and cosine losses of flow matching. B batch, C channels."""

from typing import Any

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype, inverse_norm
from sfd_kernels.registry import Op, elements


def _channel_weights(pred: Tensor, num_texture_channels: int, semantic_weight: float, dtype: torch.dtype) -> Tensor:
    is_texture = torch.arange(pred.shape[1], device=pred.device) < num_texture_channels
    return torch.where(is_texture, 1.0, semantic_weight).to(dtype)[:, None, None]


def flow_matching_loss(
    pred: Tensor, x0: Tensor, x1: Tensor, num_texture_channels: int, semantic_weight: float
) -> tuple[Tensor, Tensor]:
    """Per sample, with v = x1 - x0:  velocity = mean_{c,h,w} w_c (pred - v)^2,  cosine = mean_{h,w} (1 - cos(pred, v)).

    w_c is 1 for texture channels and semantic_weight for the others; the cosine runs along all channels, and a zero
    vector has cosine 0 and no gradient. pred, x0, x1 (B, C, H, W). Returns two (B,), float32 (float64 if an input is).
    Only pred gets a gradient: ValueError if x0 or x1 requires one. Source: docs/METHOD.md 4.
    """
    dtype = accumulation_dtype(pred, x0, x1)
    p, v = pred.to(dtype), x1.to(dtype) - x0.to(dtype)
    weights = _channel_weights(pred, num_texture_channels, semantic_weight, dtype)
    velocity = (weights * (p - v).square()).mean((1, 2, 3))
    cosine = (p * v).sum(1, keepdim=True) * inverse_norm(p, 1) * inverse_norm(v, 1)
    return velocity, (1 - cosine).mean((1, 2, 3))


def flow_matching_loss_backward(
    d_velocity: Tensor,
    d_cosine: Tensor,
    pred: Tensor,
    x0: Tensor,
    x1: Tensor,
    num_texture_channels: int,
    semantic_weight: float,
) -> Tensor:
    """dpred = d_velocity 2 w (pred - v) / (C H W) - d_cosine (v / (|p| |v|) - cos p / |p|^2) / (H W)."""
    dtype = accumulation_dtype(pred, x0, x1)
    p, v = pred.to(dtype), x1.to(dtype) - x0.to(dtype)
    weights = _channel_weights(pred, num_texture_channels, semantic_weight, dtype)
    positions = pred.shape[2] * pred.shape[3]
    inverse_p, inverse_v = inverse_norm(p, 1), inverse_norm(v, 1)
    cosine = (p * v).sum(1, keepdim=True) * inverse_p * inverse_v
    d_cos = v * (inverse_p * inverse_v) - p * (cosine * inverse_p.square())
    velocity_part = (2 * d_velocity.to(dtype) / (pred.shape[1] * positions))[:, None, None, None] * weights * (p - v)
    return (velocity_part - (d_cosine.to(dtype) / positions)[:, None, None, None] * d_cos).to(pred.dtype)


def _examples(make, size):
    latents = make.narrow(*size.latent), make.wide(*size.latent), make.wide(*size.latent)
    yield "two streams", (*latents, size.texture_channels, 2.0)
    if size.is_tiny:
        yield "zero prediction", (torch.zeros_like(latents[0]), *latents[1:], size.texture_channels, 2.0)


def _backward_examples(make, size):
    for label, args in _examples(make, size):
        yield label, (make.state(size.batch), make.state(size.batch), *args)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    pred, x0, x1, ctx.num_texture_channels, ctx.semantic_weight = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise ValueError("flow_matching_loss has no gradient for x0 and x1, but one of them requires grad; detach them")
    ctx.save_for_backward(pred, x0, x1)


def _gradient(ctx: Any, d_velocity: Tensor, d_cosine: Tensor) -> tuple:
    dpred = flow_matching_loss_backward(
        d_velocity, d_cosine, *ctx.saved_tensors, ctx.num_texture_channels, ctx.semantic_weight
    )
    return dpred, None, None, None, None


flow_matching_loss_backward = Op(flow_matching_loss_backward, examples=_backward_examples, flops=elements(2, 16))
flow_matching_loss = Op(
    flow_matching_loss,
    examples=_examples,
    flops=elements(0, 11),
    constants=("x0", "x1"),
    backward=flow_matching_loss_backward,
)
flow_matching_loss.register_autograd(_gradient, setup_context=_setup)
