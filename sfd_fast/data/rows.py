"""Rows of many memory maps, gathered by one call of one C++ loop.

A batch takes a row here and a row there of a thousand shards. One Python statement per row costs as much as copying it,
so all maps are seen as one array of machine words, from the lowest mapped address to the highest: a row is then a plain
offset, and torch.index_select copies the rows of a batch, on several threads, without the interpreter lock.
Letters: B rows of a batch, R bytes of a row.
"""

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

WORDS = {8: (ctypes.c_int64, torch.int64), 1: (ctypes.c_uint8, torch.uint8)}


class RowTable:
    """One tensor of a cache over all shards: (n_k, ...) contiguous, plain and perhaps flipped.

    Holds an address per shard, and the maps themselves alive.
    """

    def __init__(self, plain: list[Tensor], flipped: list[Tensor] | None):
        self.shape, self.dtype = tuple(plain[0].shape[1:]), plain[0].dtype
        self.has_flips = flipped is not None
        self._maps = (plain, flipped if flipped is not None else plain)
        self._addresses = np.array([[rows.data_ptr() for rows in side] for side in self._maps], dtype=np.int64)
        self.row_bytes = math.prod(self.shape) * self.dtype.itemsize
        ends = [rows.data_ptr() + rows.nbytes for side in self._maps for rows in side]
        self._low, self._span = int(self._addresses.min()), max(ends) - int(self._addresses.min())
        aligned = self.row_bytes % 8 == 0 and not ((self._addresses - self._low) % 8).any() and self._low % 8 == 0
        self._views = {size: self._view(size) for size in ((8, 1) if aligned else (1,))}

    def _view(self, word: int) -> Tensor:
        """(all offsets, R / word) words: overlapping rows, one for every word of the span."""
        c_type, _ = WORDS[word]
        words, row = self._span // word, self.row_bytes // word
        space = np.ctypeslib.as_array((c_type * words).from_address(self._low))
        return torch.from_numpy(space).as_strided((max(words - row + 1, 0), row), (1, 1))

    def shard(self, k: int) -> Tensor:
        """The plain tensor of shard k, (n_k, ...), mapped."""
        return self._maps[0][k]

    def gather(self, shards: np.ndarray, rows: np.ndarray, flip: np.ndarray, out: Tensor) -> None:
        """out[i] = row rows[i] of shard shards[i], of its flipped tensor where flip[i].

        shards, rows: (B,) int64 within range (the caller checks); flip: (B,) bool; out: (B, ...) of this dtype, each
        sample contiguous.
        """
        offsets = self._addresses[flip.astype(np.int64), shards] - self._low + rows * self.row_bytes
        target = out.flatten(1) if out.dim() > 1 else out[:, None]
        word = 8 if 8 in self._views and self._fits(target) else 1
        torch.index_select(self._views[word], 0, torch.from_numpy(offsets // word), out=target.view(WORDS[word][1]))

    def _fits(self, target: Tensor) -> bool:
        return target.data_ptr() % 8 == 0 and target.stride(0) * target.element_size() % 8 == 0
