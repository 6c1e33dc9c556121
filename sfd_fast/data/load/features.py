"""VFM features as an endless, seeded sequence of batches, streamed from memory-mapped shards.

Letters: B batch, N samples of the set, F width of a feature, h, w its grid.
"""

import logging
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfd_fast.config import require
from sfd_fast.data.cache import layout
from sfd_fast.data.cache.remote import open_shards
from sfd_fast.data.cache.shards import map_tensors
from sfd_fast.data.load.held_out import Part, SampleSet
from sfd_fast.data.load.order import flips, shuffled_indices
from sfd_fast.diffusion.statistics import first_not_finite
from sfd_fast.diffusion.transport import feature_tokens
from sfd_fast.files.ahead import ahead
from sfd_fast.files.home import with_home

log = logging.getLogger(__name__)
KEY, FLIPPED = layout.FEATURES, layout.FEATURES + layout.FLIP


class FeatureShards(SampleSet):
    """The features of a folder of shards; only what a batch needs is read from the disk.

    path: a folder, a file, or an fsspec address, which is copied into `cache_folder` first.
    Raises ValueError for an unfinished folder, and naming the shard that has no features, features of another dtype or
    shape than the first, or other settings; FileNotFoundError where the folder or a shard of its manifest is missing.
    """

    @with_home
    def __init__(self, path: str | Path, *, cache_folder: str | Path | None = None):
        self.folder, self.paths, headers = open_shards(path, cache_folder)
        key = layout.feature_key(headers[0].entries)
        for file, header in zip(self.paths, headers):
            if key not in header.entries:
                held = ", ".join(header.entries) or "nothing"
                raise ValueError(f"{file} has no tensor '{key}', it holds {held}; `sfd features` makes such shards")
            require(len(header.entries[key].shape) in (3, 4), f"{file}: '{key}' must be (N, tokens, F) or (N, F, h, w)")
            here, there = ((h.entries[key].shape[1:], h.entries[key].dtype) for h in (header, headers[0]))
            if here != there:
                raise ValueError(
                    f"{file} has features of shape {here[0]}, {here[1]}; the shards before it {there[0]}, {there[1]}"
                )
            layout.check_settings(file, header, self.paths[0], headers[0])
        maps = [map_tensors(file, header) for file, header in zip(self.paths, headers)]
        self.plain = [tensors[key] for tensors in maps]
        self.flipped = [tensors.get(FLIPPED) for tensors in maps]
        self.ends = np.cumsum([len(t) for t in self.plain])
        self._part = Part(0, int(self.ends[-1]))
        require(len(self) > 0, f"{self.folder} is a cache of no samples: encode images into it (`sfd features`)")
        self.channels = feature_tokens(self.plain[0][:0]).shape[-1]

    def says_flips(self) -> bool:
        """Whether all shards have mirrored features; says once where none has."""
        if all(flipped is None for flipped in self.flipped):
            log.info("%s has no mirrored features: plain ones alone are shown", self.folder)
            return False
        return True

    def require_flips(self) -> None:
        """Raises ValueError naming the first shard without flipped features."""
        for path, flipped in zip(self.paths, self.flipped):
            if flipped is None:
                raise ValueError(
                    f"{path} has no flipped features ({FLIPPED}): set data.flip to false, or encode both flips "
                    "(`sfd features --flip true`)"
                )

    def places(self, indices: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(shards, rows in them) of samples of this set."""
        positions = self._part.numbers(indices.numpy())
        shards = np.searchsorted(self.ends, positions, side="right")
        return shards, positions - np.concatenate([[0], self.ends])[shards]

    def gather(self, indices: Tensor, flip: Tensor) -> Tensor:
        """(B, tokens, F) float32 of the samples at `indices` (B,) int64, flipped where `flip` (B,) bool."""
        shards, rows = self.places(indices)
        chosen = [
            (self.flipped if mirrored else self.plain)[shard][row]
            for shard, row, mirrored in zip(shards.tolist(), rows.tolist(), flip.tolist())
        ]
        return feature_tokens(torch.stack(chosen)).float().contiguous()

    def flaw(self, indices: Tensor, flip: Tensor) -> str:
        """The first of some samples that is not finite as it is stored, with file and row; "" where all are finite."""
        bad = first_not_finite(self.gather(indices, flip))
        if bad is None:
            return ""
        shards, rows = (int(part[bad]) for part in self.places(indices))
        view = "mirrored " if flip[bad] else ""
        return f"{self.paths[shards]}: the {view}features of sample {rows} hold NaN or infinity"


class FeatureLoader:
    """Endless batches {"features" (B, tokens, F) float32, "sample_ids" (B,) int64} of a rank, seeded.

    Step k takes positions k * B_global .. of an endless sequence of epochs, rank r the r-th equal slice, as
    LatentLoader does: resuming is start_step. The next batch is gathered while the current one is used.
    Raises ValueError for a batch that the ranks cannot share equally, or for flips that a shard lacks.
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
        if flip:
            shards.require_flips()
        self.shards, self.global_batch_size, self.seed = shards, global_batch_size, seed
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self.flip = flip
        self.device = torch.device(device)

    def samples(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, whether flipped) of the samples at positions of the run, each (B,)."""
        flip = flips(positions, self.seed) if self.flip else torch.zeros(len(positions), dtype=torch.bool)
        return shuffled_indices(positions, len(self.shards), self.seed), flip

    def flaw(self, step: int) -> str:
        """What of a step's batch, all ranks' shares of it, is not finite as it is stored; "" where all is."""
        start = step * self.global_batch_size
        return self.shards.flaw(*self.samples(torch.arange(start, start + self.global_batch_size)))

    def batch(self, step: int) -> dict[str, Tensor]:
        size = self.global_batch_size // self.world_size
        first = step * self.global_batch_size + self.rank * size
        positions = torch.arange(first, first + size)
        features = self.shards.gather(*self.samples(positions))
        if self.device.type == "cuda":
            features, positions = features.pin_memory(), positions.pin_memory()
        return {"features": features, "sample_ids": positions}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in ahead(self.batch, count(self.start_step), num_threads=1, depth=1):
            yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
