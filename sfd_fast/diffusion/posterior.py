"""Gaussian posteriors of the autoencoders: their range, and samples of them.

Letters: B samples, C channels (C_t texture), H, W.
"""

import torch
from torch import Tensor

from sfd_fast.diffusion.random_numbers import TEXTURE_POSTERIOR
from sfd_fast.diffusion.transport import noise

LOGVAR_RANGE = (-30.0, 20.0)
"""what logvar is clamped to (docs/METHOD.md 2); a codec without variance gives the lower end"""


def posterior_noise(logvar: Tensor, eps: Tensor) -> Tensor:
    """exp(logvar / 2) * eps: standard normals at the posterior's scale."""
    return torch.exp(0.5 * logvar) * eps


def sample_posterior(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """mean + exp(logvar / 2) * eps, all of one shape; eps is standard normal."""
    return mean + posterior_noise(logvar, eps)


def add_posterior_noise(latents: Tensor, logvar: Tensor, sample_ids: Tensor, seed: int, scale: Tensor) -> Tensor:
    """Turns normalised means into samples of the posterior, in place, with noise by (seed, sample id).

    latents: (B, C, H, W), of which the first channels are those of logvar, (B, C_t, H, W); scale: (C, ...) of the
    normalisation.
    """
    logvar = logvar.float()
    eps = noise(sample_ids, logvar.shape[1:], seed, TEXTURE_POSTERIOR)
    channels = logvar.shape[1]
    latents[:, :channels].addcmul_(posterior_noise(logvar, eps), scale[:channels])
    return latents
