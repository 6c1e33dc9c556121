"""From latents as they are stored to what the network sees: one multiply-add, and the posterior's noise for moments.

Letters: B samples, C channels (C_t texture), H, W.
"""

import torch
from torch import Tensor

from sfd_fast.diffusion.random_numbers import TEXTURE_POSTERIOR
from sfd_fast.diffusion.transport import noise


def multiply_add(latents: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """latents * scale + shift in one pass, in place where they are float32. (B, C, H, W), any float; returns float32.

    scale, shift: (C, H, W) float32: CPU kernels are three times slower where these are broadcast over H and W.
    """
    if latents.device.type == "cpu":  # CUDA converts within the kernel, the CPU would in a copy of each operand
        latents = latents.float()
    return torch.addcmul(shift, latents, scale, out=latents if latents.dtype == torch.float32 else None)


def add_posterior_noise(latents: Tensor, logvar: Tensor, sample_ids: Tensor, seed: int, scale: Tensor) -> Tensor:
    """Adds exp(logvar / 2) * noise(seed, sample id) * scale to normalised means, in place: a sample of the posterior.

    latents: (B, C, H, W), of which the first channels are those of logvar, (B, C_t, H, W); scale: (C, ...) of the
    normalisation.
    """
    logvar = logvar.float()
    eps = noise(sample_ids, logvar.shape[1:], seed, TEXTURE_POSTERIOR)
    channels = logvar.shape[1]
    latents[:, :channels].addcmul_(torch.exp(0.5 * logvar) * eps, scale[:channels])
    return latents
