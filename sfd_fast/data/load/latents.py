"""Cached latents as one batched, seeded, endless sequence: memory-mapped shards, gathers, double-buffered transfer.

Letters: N samples of the set, B samples of a batch on this rank, C channels, H, W, F width and h, w grid of features.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfd_fast.data.cache import layout
from sfd_fast.data.cache.remote import local_shards
from sfd_fast.data.cache.shards import map_tensors, read_header
from sfd_fast.data.load.held_out import Part, SampleSet
from sfd_fast.data.load.order import flips, shuffled_indices
from sfd_fast.data.load.rows import Memory, Places, RowTable, RunTable
from sfd_fast.diffusion.posterior import add_posterior_noise
from sfd_fast.diffusion.statistics import ChannelMoments, LatentStatistics, join_channels, multiply_add
from sfd_fast.diffusion.transport import split_latents

Batch = dict[str, Tensor]
PLAN_STEPS = 16
"""steps whose order is computed together: some 50 bytes for each of their samples"""


class LatentShards(SampleSet):
    """A cache of latents, of the released layout or ours (docs/METHOD.md 6): the same safetensors files.

    paths: a folder, files, or a list of them; fsspec addresses (s3://, gs://, hf://, memory://) are copied into
    `cache_folder` first. Memory: the page cache, and nothing per sample.
    Raises ValueError naming the file where a shard is truncated, or differs from the first in keys, shapes or dtypes;
    FileNotFoundError where a file of the manifest is missing.
    """

    def __init__(self, paths: str | Path | Iterable[str | Path], *, cache_folder: str | Path | None = None):
        self.folder, self.paths = local_shards(paths, cache_folder)
        headers = [read_header(path) for path in self.paths]
        layout.check_alike(self.paths, headers)
        self.metadata = headers[0].metadata
        first = headers[0].entries
        self._ends = np.cumsum([header.entries[layout.LABELS].shape[0] for header in headers])
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self._part = Part(0, int(self._ends[-1]))
        maps = [map_tensors(path, header) for path, header in zip(self.paths, headers)]

        def table(key: str) -> RowTable:
            flipped = [tensors[key + layout.FLIP] for tensors in maps] if key + layout.FLIP in first else None
            return RowTable(memory, [tensors[key] for tensors in maps], flipped)

        memory = Memory(tensor for tensors in maps for tensor in tensors.values())
        self._labels = [tensors[layout.LABELS] for tensors in maps]
        self._label_table = table(layout.LABELS)
        self._texture = [table(key) for key in layout.texture_keys(first)]
        self._semantic = [table(key) for key in layout.semantic_keys(first)]
        self._logvar = table(layout.TEXTURE_LOGVAR) if layout.TEXTURE_LOGVAR in first else None
        self._features = table(layout.FEATURES) if layout.FEATURES in first else None
        streams = self._texture + self._semantic
        self._runs = RunTable(memory, streams) if RunTable.fits(streams) else None
        self._memory = memory
        self.dtype, self.grid = self._texture[0].dtype, self._texture[0].shape[1:]
        self.texture_channels = sum(rows.shape[0] for rows in self._texture)
        self.semantic_channels = sum(rows.shape[0] for rows in self._semantic)
        mirrored = self._texture + self._semantic + ([self._logvar] if self._logvar else [])
        self.has_flips = all(rows.has_flips for rows in mirrored)
        self.features_have_flips = self._features is not None and self._features.has_flips

    @property
    def channels(self) -> int:
        return self.texture_channels + self.semantic_channels

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        """(F, h, w) of the stored VFM features, None where the cache has none."""
        return self._features.shape if self._features else None

    @property
    def max_label(self) -> int:
        """The largest label of the whole cache."""
        return max(int(part.max()) for part in self._labels if len(part))

    def shard_moments(self, k: int) -> tuple[ChannelMoments, ChannelMoments]:
        """Moments of the unflipped (texture, semantic) latents of shard k, whole whatever the slice.

        Raises ValueError naming the shard where a value is not finite.
        """
        moments = []
        for tables in (self._texture, self._semantic):
            parts = [ChannelMoments.empty(0)]
            for table in tables:
                try:
                    parts.append(ChannelMoments.of(table.shard(k)))
                except ValueError as error:
                    raise ValueError(f"{self.paths[k]}: {error}") from None
            moments.append(join_channels(parts))
        if self._logvar:
            moments[0] = moments[0].with_noise(self._logvar.shard(k))
        return moments[0], moments[1]

    def statistics(self, multiplier: float = 1.0) -> LatentStatistics:
        """The statistics beside the cache. Raises ValueError where they have other channel counts than the latents."""
        statistics = LatentStatistics.load(self.folder, multiplier, semantic=self.semantic_channels > 0)
        have = (statistics.texture_channels, statistics.semantic_channels)
        if have != (self.texture_channels, self.semantic_channels):
            raise ValueError(
                f"statistics in {self.folder} are of {have[0]} + {have[1]} channels, its latents have "
                f"{self.texture_channels} + {self.semantic_channels}: they come from different caches"
            )
        return statistics

    def gather(self, indices: Tensor, flip: Tensor, *, features: bool | None = None) -> Batch:
        """The stored values of some samples, copied.

        indices: (B,) int64 in 0 .. N - 1; flip: (B,) bool, which of them are read flipped; features: False leaves them
        out where the cache has them.
        Returns {"texture": (B, C_t, H, W), "semantic": (B, C_s, H, W), "labels": (B,) int64} in the stored dtype,
        "features" (B, F, h, w) where the cache has them, and "texture_logvar" where it holds moments (texture is then
        the posterior's mean). Raises IndexError, or ValueError where flips are asked for and not stored.
        """
        if flip.any() and not self.has_flips:
            raise ValueError(f"{self.paths[0]} has no flipped latents")
        slot = self.slot(len(indices), features=self._features is not None and features is not False)
        self.fill(slot, self.locate(indices, flip))
        texture, semantic = split_latents(slot["latents"], self.texture_channels)
        out = {"texture": texture, "semantic": semantic, "labels": slot["labels"].long()}
        renamed = {"features": "features", "logvar": "texture_logvar"}
        return out | {name: slot[key] for key, name in renamed.items() if key in slot}

    def slot(self, size: int, *, features: bool, pinned: bool = False) -> Batch:
        """Host memory for one batch as it is stored; the latents are one raw composite."""
        shapes = {
            "latents": ((self.channels, *self.grid), self.dtype),
            "labels": ((), self._label_table.dtype),
            "sample_ids": ((), torch.int64),
        }
        if self._logvar:
            shapes["logvar"] = (self._logvar.shape, self._logvar.dtype)
        if features:
            shapes["features"] = (self._features.shape, self._features.dtype)
        return {
            name: torch.empty((size, *shape), dtype=dtype, pin_memory=pinned) for name, (shape, dtype) in shapes.items()
        }

    def locate(self, indices: Tensor, flip: Tensor) -> Places:
        """Where samples lie. indices, flip: of one shape, as in gather. Raises IndexError outside the set."""
        positions = indices.numpy()
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"sample indices {positions.min()} to {positions.max()}; there are {len(self)} samples")
        positions = self._part.numbers(positions)
        shards = np.searchsorted(self._ends, positions, side="right")
        places = Places(shards, positions - self._starts[shards], flip.numpy())
        return places if self._runs is None else replace(places, runs=self._runs.numbers(places))

    def fill(self, slot: Batch, places: Places) -> None:
        """Copies the samples that `locate` found, (B,), into a slot of B."""
        if self._runs is not None:
            self._runs.gather(places, slot["latents"])
        else:
            texture, semantic = split_latents(slot["latents"], self.texture_channels)
            for stream, tables in ((texture, self._texture), (semantic, self._semantic)):
                parts = stream.split([table.shape[0] for table in tables], dim=1) if tables else ()
                for table, part in zip(tables, parts):
                    table.gather(places, part)
        for name, table in (("features", self._features), ("logvar", self._logvar)):
            if name in slot:
                table.gather(places, slot[name])
        self._label_table.gather(places, slot["labels"])

    def flaw(self, indices: Tensor, flip: Tensor, *, features: bool) -> str:
        """The first of some samples that is not finite as it is stored, with file and row; "" where all are finite."""
        slot, places = self.slot(len(indices), features=features), self.locate(indices, flip)
        self.fill(slot, places)
        for name in ("latents", "logvar", "features"):
            if name not in slot:
                continue
            bad = torch.isfinite(slot[name]).flatten(1).all(dim=1).logical_not().nonzero()
            if len(bad):
                i = int(bad[0])
                view, path = "mirrored " if places.flip[i] else "", self.paths[places.shards[i]]
                return f"{path}: the {view}{name} of sample {places.rows[i]} hold NaN or infinity"
        return ""


class LatentLoader:
    """Endless normalised batches in a seeded order that depends on nothing but the seed.

    Step k of a run takes the positions k * B_global .. (k + 1) * B_global - 1 of one endless sequence of epochs, each a
    permutation of the set (sfd_fast.data.load.order). Rank r takes the r-th equal slice: ranks are disjoint, together
    complete, and a batch may span two epochs, so no sample is dropped or repeated within an epoch whatever the sizes.
    The position is the step: resuming is start_step. num_workers threads gather (and on the CPU normalise) ahead;
    order and bytes do not depend on their number. On CUDA, slots are pinned and batch k + 1 is copied while k is used.

    Yields {"latents": (B, C, H, W) float32 normalised composite, "labels": (B,) int64, "sample_ids": (B,) int64 the
    position in the run}, and "features" (B, F, h, w) in the stored dtype where features=True. A cache of moments is
    sampled by (seed, position in the run), anew at every visit.
    Raises ValueError for a batch that the ranks cannot share equally, or for flips or features that the cache lacks.
    """

    def __init__(
        self,
        shards: LatentShards,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        *,
        statistics: LatentStatistics | None = None,
        flip: bool = True,
        shuffle: bool = True,
        features: bool | None = None,
        num_workers: int = 2,
        device: torch.device | str = "cpu",
    ):
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} must be a multiple of the {world_size} ranks: unequal shares "
                "would weigh samples differently"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} must be in 0 to {world_size - 1}")
        if len(shards) == 0:
            raise ValueError("the cache holds no samples")
        if flip and not shards.has_flips:
            raise ValueError(
                f"{shards.paths[0]} has no flipped latents (latents_flip, latents_sv_flip): pass flip=False "
                "(data.flip), or encode both flips"
            )
        if features and shards.feature_shape is None:
            raise ValueError(
                f"{shards.paths[0]} has no VFM features (feats_dino), which REPA needs: set data.targets to semvae or "
                "online, encode them (`sfd encode --features true`), or set transport.repa_weight to 0"
            )
        self.shards, self.global_batch_size, self.seed = shards, global_batch_size, seed
        self.rank, self.world_size, self.step = rank, world_size, start_step
        self.statistics = shards.statistics() if statistics is None else statistics
        self.flip, self.shuffle, self.num_workers = flip, shuffle, num_workers
        self.features = shards.feature_shape is not None if features is None else features
        if flip and self.features and not shards.features_have_flips:
            raise ValueError(
                f"{shards.paths[0]} has flipped latents but no flipped VFM features (feats_dino_flip): mirrored "
                "latents would be aligned with features of the plain image; pass flip=False (data.flip), or encode "
                "both flips"
            )
        self.device = torch.device(device)
        self._plan = lru_cache(maxsize=2 + self.num_workers)(self._plan_block)
        affine = self.statistics.scale_and_shift()
        if len(affine[0]) != shards.channels:
            raise ValueError(
                f"statistics of {len(affine[0])} channels for latents of {shards.channels}: they come from different "
                "caches"
            )
        self._scale, self._shift = (v.expand(-1, *shards.grid).contiguous().to(self.device) for v in affine)

    @property
    def batch_size(self) -> int:
        """B, samples of a batch on this rank."""
        return self.global_batch_size // self.world_size

    def positions(self, step: int) -> Tensor:
        """Positions in the run that this rank takes at a step, (B,) int64."""
        start = step * self.global_batch_size + self.rank * self.batch_size
        return torch.arange(start, start + self.batch_size)

    def indices(self, positions: Tensor) -> Tensor:
        """Samples of the set at positions of the run, (B,) int64."""
        if self.shuffle:
            return shuffled_indices(positions, len(self.shards), self.seed)
        return positions % len(self.shards)

    def flips(self, positions: Tensor) -> Tensor:
        """Whether the samples at positions of the run are shown flipped, (B,) bool."""
        return flips(positions, self.seed) if self.flip else torch.zeros(len(positions), dtype=torch.bool)

    def flaw(self, step: int) -> str:
        """What of a step's batch, all ranks' shares of it, is not finite as it is stored; "" where all is."""
        start = step * self.global_batch_size
        positions = torch.arange(start, start + self.global_batch_size)
        return self.shards.flaw(self.indices(positions), self.flips(positions), features=self.features)

    def gather(self, step: int, slot: Batch) -> Batch:
        """The raw batch of a step, as it is stored, in host memory."""
        positions, places = (part[step % PLAN_STEPS] for part in self._plan(step // PLAN_STEPS))
        self.shards.fill(slot, places)
        slot["sample_ids"].copy_(positions)
        return slot

    def _plan_block(self, block: int) -> tuple[Tensor, Places]:
        """Positions of PLAN_STEPS steps and where their samples lie, (PLAN_STEPS, B): one call costs less."""
        steps = range(block * PLAN_STEPS, (block + 1) * PLAN_STEPS)
        positions = torch.cat([self.positions(step) for step in steps])
        indices, flip = self.indices(positions), self.flips(positions)
        found = self.shards.locate(indices.view(PLAN_STEPS, -1), flip.view(PLAN_STEPS, -1))
        return positions.view(PLAN_STEPS, -1), found

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current step on; `step` counts the batches handed out."""
        batches = self._on_device() if self.device.type == "cuda" else self._on_host()
        try:
            for batch in batches:
                self.step += 1
                yield batch
        finally:
            batches.close()

    def raw(self, *, pinned: bool = False, ready: Callable[[int], None] = lambda place: None) -> Iterator:
        """(place, batch as it is stored) in order, in a ring of num_workers + 2 host slots.

        A batch stays valid until the next but one is asked for; ready(place) is called before its slot is filled again.
        """
        ring = [
            self.shards.slot(self.batch_size, features=self.features, pinned=pinned)
            for _ in range(self.num_workers + 2)
        ]

        def work(step: int) -> tuple[int, Batch]:
            place = step % len(ring)
            ready(place)
            return place, self.gather(step, ring[place])

        yield from self._ordered(work)

    def _normalized(self, raw: Batch) -> Batch:
        """The batch that is handed out; overwrites float32 latents."""
        latents = multiply_add(raw["latents"], self._scale, self._shift)
        if "logvar" in raw:
            add_posterior_noise(latents, raw["logvar"], raw["sample_ids"], self.seed, self._scale)
        out = {"latents": latents, "labels": raw["labels"].long(), "sample_ids": raw["sample_ids"]}
        return out | ({"features": raw["features"]} if "features" in raw else {})

    def _on_host(self) -> Iterator[Batch]:
        def work(step: int) -> Batch:
            return self._normalized(self.gather(step, self.shards.slot(self.batch_size, features=self.features)))

        yield from self._ordered(work)

    def _on_device(self) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device)
        copied: dict[int, torch.cuda.Event] = {}
        waiting: deque[tuple[Batch, torch.cuda.Event]] = deque()

        def ready(place: int) -> None:
            if place in copied:
                copied[place].synchronize()

        for place, slot in self.raw(pinned=True, ready=ready):
            with torch.cuda.stream(stream):
                moved = {name: v.to(self.device, non_blocking=True, copy=True) for name, v in slot.items()}
                copied[place] = stream.record_event()
                waiting.append((self._normalized(moved), stream.record_event()))
            if len(waiting) > 1:
                batch, done = waiting.popleft()
                current = torch.cuda.current_stream(self.device)
                current.wait_event(done)
                for value in batch.values():
                    value.record_stream(current)
                yield batch

    def _ordered(self, work: Callable) -> Iterator:
        """work(step) for every step in order, up to num_workers of them ahead."""
        if self.num_workers == 0:
            yield from map(work, count(self.step))
            return
        running: deque[Future] = deque()
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="latents") as pool:
            try:
                for step in count(self.step):
                    running.append(pool.submit(work, step))
                    if len(running) > self.num_workers:
                        yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()
