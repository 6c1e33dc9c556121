"""VFM features as an endless, seeded sequence of batches, streamed from memory-mapped shards.

Letters: B batch, N samples of the set, F width of a feature, h, w its grid.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfd_fast.data.order import flips, shuffled_indices
from sfd_fast.data.shards import map_tensors, read_header, shard_paths
from sfd_fast.transport import feature_tokens

KEY = "feats_dino"
FLIPPED = "feats_dino_flip"


class FeatureShards:
    """The features of a folder of shards; only what a batch needs is read from the disk.

    Raises ValueError naming the shard that has no features, or features of another shape than the first.
    """

    def __init__(self, path: str | Path):
        self.plain: list[Tensor] = []
        self.flipped: list[Tensor] = []
        for file in shard_paths(path):
            tensors = map_tensors(file, read_header(file))
            if KEY not in tensors:
                held = ", ".join(tensors) or "nothing"
                raise ValueError(f"{file} has no tensor '{KEY}', it holds {held}; `sfd features` makes such shards")
            if self.plain and tensors[KEY].shape[1:] != self.plain[0].shape[1:]:
                shapes = tuple(tensors[KEY].shape[1:]), tuple(self.plain[0].shape[1:])
                raise ValueError(f"{file} has features of shape {shapes[0]}, the shards before it {shapes[1]}")
            self.plain.append(tensors[KEY])
            if FLIPPED in tensors:
                self.flipped.append(tensors[FLIPPED])
        self.has_flips = len(self.flipped) == len(self.plain)
        self.ends = np.cumsum([len(t) for t in self.plain])
        self.start, self.stop = 0, int(self.ends[-1])
        self.channels = feature_tokens(self.plain[0][:0]).shape[-1]

    def __len__(self) -> int:
        return self.stop - self.start

    def slice(self, start: int, stop: int) -> "FeatureShards":
        """The samples start .. stop - 1 as a set of their own."""
        part = object.__new__(FeatureShards)
        part.__dict__.update(self.__dict__)
        part.start, part.stop = self.start + start, self.start + stop
        return part

    def gather(self, indices: Tensor, flip: Tensor) -> Tensor:
        """(B, tokens, F) float32 of the samples at `indices` (B,) int64, flipped where `flip` (B,) bool."""
        positions = indices.numpy() + self.start
        shards = np.searchsorted(self.ends, positions, side="right")
        rows = positions - np.concatenate([[0], self.ends])[shards]
        chosen = [
            (self.flipped if mirrored else self.plain)[shard][row]
            for shard, row, mirrored in zip(shards.tolist(), rows.tolist(), flip.tolist())
        ]
        return feature_tokens(torch.stack(chosen)).float().contiguous()


class FeatureLoader:
    """Endless batches {"features" (B, tokens, F) float32, "sample_ids" (B,) int64} of a rank, seeded.

    Step k takes positions k * B_global .. of an endless sequence of epochs, rank r the r-th equal slice, as
    LatentLoader does: resuming is start_step. The next batch is gathered while the current one is used.
    """

    def __init__(
        self,
        shards: FeatureShards,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        *,
        flip: bool = True,
        device: torch.device | str = "cpu",
    ):
        if global_batch_size % world_size:
            raise ValueError(f"global_batch_size {global_batch_size} must be a multiple of the {world_size} ranks")
        self.shards, self.global_batch_size, self.seed = shards, global_batch_size, seed
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self.flip = flip and shards.has_flips
        self.device = torch.device(device)

    def batch(self, step: int) -> dict[str, Tensor]:
        size = self.global_batch_size // self.world_size
        first = step * self.global_batch_size + self.rank * size
        positions = torch.arange(first, first + size)
        flip = flips(positions, self.seed) if self.flip else torch.zeros(size, dtype=torch.bool)
        features = self.shards.gather(shuffled_indices(positions, len(self.shards), self.seed), flip)
        if self.device.type == "cuda":
            features, positions = features.pin_memory(), positions.pin_memory()
        return {"features": features, "sample_ids": positions}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        with ThreadPoolExecutor(1, thread_name_prefix="features") as pool:
            ahead = pool.submit(self.batch, self.start_step)
            for step in count(self.start_step + 1):
                batch = ahead.result()
                ahead = pool.submit(self.batch, step)
                yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
