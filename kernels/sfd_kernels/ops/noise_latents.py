"""Interpolation between noise and data on two clocks. B batch, C channels."""

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype
from sfd_kernels.registry import Op, elements


def noise_latents(x1: Tensor, x0: Tensor, t_tex: Tensor, t_sem: Tensor, num_texture_channels: int) -> Tensor:
    """x_t = (1 - t) x0 + t x1, with t = t_tex for the first num_texture_channels channels and t_sem for the others.

    x1 (data) and x0 (noise) (B, C, H, W); t_tex and t_sem (B,). Returns (B, C, H, W) in the dtype of x1.
    Source: SFD (arXiv 2512.04926), asynchronous denoising (docs/METHOD.md 1).
    """
    dtype = accumulation_dtype(x1, x0, t_tex, t_sem)
    is_texture = torch.arange(x1.shape[1], device=x1.device) < num_texture_channels
    t = torch.where(is_texture, t_tex.to(dtype)[:, None], t_sem.to(dtype)[:, None])[:, :, None, None]
    return ((1 - t) * x0.to(dtype) + t * x1.to(dtype)).to(x1.dtype)


def _examples(make, size):
    clocks = make.uniform(size.batch), make.uniform(size.batch)
    yield "two clocks", (make.wide(*size.latent), make.wide(*size.latent), *clocks, size.texture_channels)
    if size.is_tiny:
        yield "texture only", (make.wide(*size.latent), make.wide(*size.latent), *clocks, size.latent[1])


noise_latents = Op(noise_latents, examples=_examples, flops=elements(0, 3))
