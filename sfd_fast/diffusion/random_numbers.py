"""The one table of Philox stream numbers: every random use of the system has its own.

A random number is a function of (seed, sample id, stream number, position) and of nothing else
(sfd_kernels.philox_bits): no result depends on batch composition, world size or what was drawn before, and resuming
needs no generator state. `stream` is such a number here and in the kernels; everywhere else a stream is the texture or
the semantic channels, which have a clock each. Two uses with the same number would be correlated: add a line here,
never reuse one, never change one that runs depend on.
"""

import torch
from sfd_kernels import philox_bits
from torch import Tensor

SAMPLE_NOISE = 0
"""x at tau = 0 when sampling; sample id = number of the image"""
TRAIN_NOISE = 1
"""x_0 in training; sample id = position of the sample in the run"""
TRAIN_TIME = 2
"""tau in training"""
LABEL_DROPOUT = 3
"""labels replaced by the null class for classifier-free guidance"""
FLIP = 4
"""flipped or plain latents"""
DATA_ORDER = 5
"""permutation of the training set; sample id = index in the set"""
TEXTURE_POSTERIOR = 6
"""sampling the texture codec's posterior while latents are encoded; sample id = index of the image"""
SEMANTIC_POSTERIOR = 7
"""sampling SemVAE's posterior while latents are encoded"""
SEMVAE_NOISE = 8
"""SemVAE's reparametrisation noise in training; sample id = position in the run"""
LABEL_ORDER = 9
"""permutation of class-balanced labels over sample ids"""
OUTPUT_ORDER = 10
"""permutation of generated images in the evaluator's npz; sample id = number of the image"""
CODEC_NOISE = 11
"""texture posterior flipped: the mirrored image draws its own noise"""
SEMANTIC_FLIP_NOISE = 12
"""semantic posterior of the mirrored image"""
HELD_OUT = 13
"""which samples of a cache are held out; sample id = number of the held-out sample, seed 0"""


def uniform(sample_ids: Tensor, *, seed: int, stream: int, count: int = 1) -> Tensor:
    """Uniform numbers on the open interval (0, 1): (bits + 0.5) 2^-32.

    sample_ids: (B,) int64.  Returns (B, count) float64, so that neither 0 nor 1 occurs.
    """
    return (philox_bits(sample_ids, seed, stream, count).to(torch.float64) + 0.5) * 2.0**-32


def permutation(size: int, *, seed: int, stream: int) -> Tensor:
    """A permutation of 0 .. size - 1 as a function of (seed, stream): the order of 64 random bits per element.

    Returns (size,) int64. Ties, improbable, keep their order.
    """
    bits = philox_bits(torch.arange(size), seed, stream, 2)
    return torch.argsort((bits[:, 0] - 2**31) * 2**32 + bits[:, 1], stable=True)
