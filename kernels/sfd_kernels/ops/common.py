"""Arithmetic that several references share."""

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which a reference computes: promote_types of all given tensors and float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x_hat = x * rstd and rstd = rsqrt(mean(x^2) + eps) along the last dimension, which rstd keeps."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def normalize_backward(d_hat: Tensor, x_hat: Tensor, rstd: Tensor) -> Tensor:
    """dx of `normalize` given the gradient of x_hat: rstd (d_hat - x_hat mean(d_hat x_hat))."""
    return rstd * (d_hat - x_hat * (d_hat * x_hat).mean(-1, keepdim=True))


COSINE_EPS = 1e-8


def inverse_norm(x: Tensor, dim: int) -> Tensor:
    """1 / |x| along dim (kept), and 0 where |x| <= 1e-8.

    A zero vector then has cosine 0 and passes no gradient. F.cosine_similarity divides by 1e-8 instead, which sends a
    gradient of 1e8 through a zero-initialised layer at the first step.
    """
    squared = x.square().sum(dim, keepdim=True)
    nonzero = squared > COSINE_EPS**2
    return torch.where(nonzero, torch.rsqrt(torch.where(nonzero, squared, 1.0)), 0.0)
