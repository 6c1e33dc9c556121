"""Rows of many memory maps, gathered by one call of one C loop.

A batch takes a row here and a row there of a thousand shards. One Python statement per row costs as much as copying it,
so all maps are seen as one array, from the lowest mapped address to the highest, and a row is a plain offset in it.
Where all rows begin on page borders (our shards do), one np.take copies a whole batch; elsewhere (released shards)
torch.index_select copies the rows of each tensor. Neither holds the interpreter lock.
Letters: B rows of a batch, R bytes of a row.
"""

import ctypes
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfd_fast.data.cache.shards import BORDER, PAGE

WORDS = {8: (ctypes.c_int64, torch.int64), 1: (ctypes.c_uint8, torch.uint8)}


class MappedMemory:
    """The address space from the first byte of some tensors to the last. Only what is mapped may be read.

    Holds the tensors, and with them their maps, alive.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._tensors = [tensor for tensor in tensors if tensor.nbytes]  # an empty one has no address
        first = min(tensor.data_ptr() for tensor in self._tensors)
        self.low = first - first % BORDER
        self.size = max(tensor.data_ptr() + tensor.nbytes for tensor in self._tensors) - self.low

    def rows(self, word: int, count: int) -> Tensor:
        """(all offsets, count) words of `word` bytes: overlapping rows, one that begins at every word."""
        c_type, _ = WORDS[word]
        words = self.size // word
        space = np.ctypeslib.as_array((c_type * words).from_address(self.low))
        return torch.from_numpy(space).as_strided((max(words - count + 1, 0), count), (1, 1))

    def runs(self, unit: int) -> np.ndarray:
        """(all, unit) uint8: the memory in runs of `unit` bytes, a multiple of PAGE that divides BORDER."""
        count = -(-self.size // unit)
        return np.ctypeslib.as_array((ctypes.c_uint8 * (count * unit)).from_address(self.low)).reshape(count, unit)


class RowTable:
    """One tensor of a cache over all shards: (n_k, ...) contiguous, plain and perhaps flipped; an address per shard.

    unit: the longest run, up to BORDER, on whose borders all rows begin and end.
    """

    def __init__(self, memory: MappedMemory, plain: list[Tensor], flipped: list[Tensor] | None):
        self.shape, self.dtype = tuple(plain[0].shape[1:]), plain[0].dtype
        self.has_flips = flipped is not None
        self.row_bytes = math.prod(self.shape) * self.dtype.itemsize
        self._plain = plain
        addresses = [[rows.data_ptr() or memory.low for rows in side] for side in (plain, flipped or plain)]
        self._offsets = np.array(addresses, dtype=np.int64) - memory.low
        self.unit = math.gcd(BORDER, self.row_bytes, *self._offsets.flatten().tolist())
        aligned = self.row_bytes % 8 == 0 and not (self._offsets % 8).any()
        self._views = {word: memory.rows(word, self.row_bytes // word) for word in ((8, 1) if aligned else (1,))}

    def shard(self, k: int) -> Tensor:
        """The plain tensor of shard k, (n_k, ...), mapped."""
        return self._plain[k]

    def offsets(self, places: "Places") -> np.ndarray:
        """Where the rows begin in the memory, bytes; the shape of `places`."""
        return self._offsets[places.flip.astype(np.int64), places.shards] + places.rows * self.row_bytes

    def gather(self, places: "Places", out: Tensor) -> None:
        """Copies rows to out, (B, ...) of this dtype with each sample contiguous. places: (B,)."""
        target = out.flatten(1) if out.dim() > 1 else out[:, None]
        fits = target.data_ptr() % 8 == 0 and target.stride(0) * target.element_size() % 8 == 0
        word = 8 if fits and 8 in self._views else 1
        numbers = torch.from_numpy(self.offsets(places) // word)
        torch.index_select(self._views[word], 0, numbers, out=target.view(WORDS[word][1]))


@dataclass(frozen=True)
class Places:
    """Where samples lie: row rows[i] of shard shards[i], flipped where flip[i]; within range. All of one shape."""

    shards: np.ndarray
    rows: np.ndarray
    flip: np.ndarray
    runs: np.ndarray | None = None
    """(..., runs of a sample) numbers in RunTable's memory, where it is used"""

    def __getitem__(self, i: int) -> "Places":
        runs = None if self.runs is None else self.runs[i]
        return Places(self.shards[i], self.rows[i], self.flip[i], runs)


class RunTable:
    """Several tables whose rows begin on borders of pages, one after the other within each sample, copied at once."""

    def __init__(self, memory: MappedMemory, tables: Sequence[RowTable]):
        self._tables, self._unit = tables, math.gcd(*(table.unit for table in tables))
        self._runs = memory.runs(self._unit)

    @classmethod
    def fits(cls, tables: Sequence[RowTable]) -> bool:
        return all(table.unit % PAGE == 0 for table in tables)

    def numbers(self, places: Places) -> np.ndarray:
        """The runs of each sample, in the order of the tables: (..., runs of a sample) int64."""
        parts = [
            (table.offsets(places) // self._unit)[..., None] + np.arange(table.row_bytes // self._unit)
            for table in self._tables
        ]
        return np.concatenate(parts, axis=-1)

    def gather(self, places: Places, out: Tensor) -> None:
        """out: (B, ...) contiguous, a sample of as many bytes as a row of each table together. places: (B,)."""
        target = out.view(-1).view(torch.uint8).numpy().reshape(len(out), -1, self._unit)
        # "clip" writes into out directly; every number is within range
        np.take(self._runs, places.runs, axis=0, out=target, mode="clip")
