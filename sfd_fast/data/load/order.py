"""Which sample stands at which position of a run: a seeded permutation per epoch, computed, never stored.

A run is one endless sequence of positions p = 0, 1, 2, ...; epoch p // N shows every sample of the set once. A batch
may therefore span two epochs, and nothing is dropped or repeated where N is no multiple of the batch size.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from sfd_kernels import philox_bits
from torch import Tensor

from sfd_fast.diffusion import random_numbers

ROUNDS = 8
"""Feistel rounds; 4 already give a pseudo-random permutation with a good round function (Luby, Rackoff 1988)"""


def shuffled_indices(positions: Tensor, num_samples: int, seed: int) -> Tensor:
    """The samples at those positions of a run: index = P_{seed, epoch}(p mod N), epoch = p // N.

    P is a Feistel network on Z_m x Z_m, m = ceil(sqrt(N)), (l, r) -> (r, l + F(r) mod m), a bijection of 0 .. m^2 - 1;
    values at or above N are mapped again until they fall below it (cycle walking), which leaves a bijection of
    0 .. N - 1. No memory per sample, any position in constant time, the same on every rank.
    positions: (B,) int64, not negative.  Returns (B,) int64 in 0 .. N - 1.
    """
    epochs, offsets = np.divmod(positions.numpy(), num_samples)
    out = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        out[chosen] = _permute(offsets[chosen].astype(np.uint64), num_samples, _round_keys(seed, int(epoch)))
    return torch.from_numpy(out)


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    words = philox_bits(torch.tensor([epoch]), seed, random_numbers.DATA_ORDER, 2 * ROUNDS)[0].tolist()
    return tuple(np.uint64(high << 32 | low) for low, high in zip(words[0::2], words[1::2]))


def _permute(values: np.ndarray, num_samples: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    side = np.uint64(math.isqrt(num_samples - 1) + 1)
    values = _feistel(values, side, keys)
    outside = values >= num_samples
    while outside.any():
        values[outside] = _feistel(values[outside], side, keys)
        outside = values >= num_samples
    return values.astype(np.int64)


def _feistel(values: np.ndarray, side: np.uint64, keys: tuple[np.uint64, ...]) -> np.ndarray:
    left, right = np.divmod(values, side)
    for key in keys:
        left, right = right, (left + _mix(right ^ key) % side) % side
    return left * side + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): 64 bits to 64 well mixed bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def flips(positions: Tensor, seed: int) -> Tensor:
    """Whether the sample at each position is shown flipped: one random bit of (seed, position).

    positions: (B,) int64.  Returns (B,) bool, true with probability 1/2.
    """
    return (philox_bits(positions, seed, random_numbers.FLIP, 1)[:, 0] & 1).bool()
