"""Parts of a set of samples: stretches of it, and held-out samples that are spread over the whole set.

Caches are ordered by class, so held-out data is no stretch of them: it would be the last classes alone. N samples of
the set, M held-out ones.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from sfd_kernels import philox_bits
from torch import Tensor

from sfd_fast.config import require
from sfd_fast.diffusion import random_numbers

SPREAD = "spread over the set (versions before held out its last samples)"
"""how samples are held out, for the identity of a run: a run that held out others cannot be continued"""


def held_out_numbers(num_samples: int, count: int) -> np.ndarray:
    """One sample of each of `count` stretches of about N / M samples, at a random place of its stretch.

    So every class of an ordered set has its share, and no period of the order is met by a stride. The same for every
    run, rank and training seed: losses of different runs compare. Returns (M,) int64, rising.
    """
    borders = np.arange(count + 1, dtype=np.int64) * num_samples // max(count, 1)
    places = philox_bits(torch.arange(count), 0, random_numbers.HELD_OUT, 1)[:, 0].numpy()
    return borders[:-1] + places % np.diff(borders)


@dataclass(frozen=True)
class Part:
    """Which samples of a set a part shows, and in which order; 8 bytes for each held-out sample and none for others."""

    start: int
    stop: int
    chosen: np.ndarray | None = None
    """(M,) numbers that the part takes its samples from, instead of the whole set"""
    before: np.ndarray | None = None
    """(M,) for each left-out sample, in rising order, how many of the others stand before it"""

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """Numbers in the whole set of samples of this part, int64, both of one shape."""
        positions = indices + self.start
        if self.chosen is not None:
            return self.chosen[positions]
        if self.before is not None:
            return positions + np.searchsorted(self.before, positions, side="right")
        return positions


class SampleSet:
    """A set of samples that can be divided. Parts share everything with the whole but the samples that they show."""

    _part: Part

    def __len__(self) -> int:
        return self._part.stop - self._part.start

    def numbers(self, indices: Tensor) -> Tensor:
        """Numbers in the whole set of samples of this part. (B,) int64, both."""
        return torch.from_numpy(self._part.numbers(indices.numpy()))

    def slice(self, start: int, stop: int) -> Self:
        """The samples start .. stop - 1 as a set of their own. Raises ValueError where there are not so many."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"samples {start} to {stop} are not within the {len(self)} samples of the cache")
        return self._showing(replace(self._part, start=self._part.start + start, stop=self._part.start + stop))

    def divide(self, count: int) -> tuple[Self, Self | None]:
        """(training set, held-out set) of a whole set; (the set, None) for a count of 0.

        Raises ValueError where nothing would be left to train on.
        """
        require(
            count < len(self),
            f"data.validation_samples {count} leaves nothing of the {len(self)} samples to train on",
        )
        if count == 0:
            return self, None
        part = self._part
        assert part.start == 0 and part.chosen is None and part.before is None, "a part is not divided"
        held_out = held_out_numbers(len(self), count)
        training = Part(0, len(self) - count, before=held_out - np.arange(count))
        return self._showing(training), self._showing(Part(0, count, chosen=held_out))

    def _showing(self, part: Part) -> Self:
        shown = object.__new__(type(self))
        shown.__dict__.update(self.__dict__)
        shown._part = part
        return shown
