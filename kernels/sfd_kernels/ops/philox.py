"""Counter-based random numbers: an image's noise depends on its seed and id alone. B samples."""

import math

import torch
from torch import Tensor

from sfd_kernels.registry import Op

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words, each in an int64 tensor, from four counter words and two key words.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap, but their 64 bits are right; the mask makes the shift a logical one.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_bits(sample_ids: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """`count` words of 32 random bits for every sample, as int64 (B, count).

    Block j of a sample gives words 4j to 4j + 3: key (seed low, seed high), counter (j, stream, id low, id high).
    sample_ids (B,) int64; seed 64-bit; stream 32-bit, one for each use of randomness.
    """
    blocks = torch.arange((count + 3) // 4, device=sample_ids.device)[None]
    ids = sample_ids[:, None]
    counter = torch.broadcast_tensors(blocks, torch.full_like(blocks, stream & _MASK), ids & _MASK, (ids >> 32) & _MASK)
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def philox_normal(sample_ids: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """`count` standard normal numbers for every sample, float32 (B, count).

    Box-Muller in float64 on consecutive words (a, b) of philox_bits: r cos(p), r sin(p) with
    r = sqrt(-2 ln((a + 0.5) 2^-32)) and p = 2 pi (b + 0.5) 2^-32, rounded to float32.
    """
    words = philox_bits.reference(sample_ids, seed, stream, count + count % 2).double()
    a, b = ((words + 0.5) * 2.0**-32).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2 * torch.log(a)), 2 * math.pi * b
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    return normals[:, :count].float()


def _examples(make, size):
    channels = size.texture_channels + size.semantic_channels
    ids = torch.arange(size.batch, device=make.device) + 50_000
    yield "latents", (ids, 1234, 1, channels * size.grid**2)
    if size.is_tiny:
        yield "wide ids", (make.integers(0, 2**32 + 5, 2**62), 2**63 - 1, 2**32 - 1, 7)
        yield "negative seed", (make.integers(3), -(2**63), 0, 1)


philox_bits = Op(philox_bits, examples=_examples, flops=lambda ids, seed, stream, count: 30 * ids.numel() * count)
philox_normal = Op(philox_normal, examples=_examples, flops=lambda ids, seed, stream, count: 60 * ids.numel() * count)
