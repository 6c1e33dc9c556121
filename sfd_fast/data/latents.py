"""Cached latents as one batched, seeded, endless sequence: memory-mapped shards, gathers, double-buffered transfer.

Letters: N samples of the set, B samples of a batch on this rank, C channels, H, W, F width and h, w grid of features.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfd_fast.data.order import flips, shuffled_indices
from sfd_fast.data.remote import local_shards
from sfd_fast.data.shards import Entry, Header, map_tensors, read_header
from sfd_fast.data.statistics import LatentStatistics
from sfd_fast.transport import split_latents

TEXTURE_KEYS = ("latents", "latents_dino")
"""in the order of their channels; PCA features of older caches (METHOD 6) count as texture"""
SEMANTIC_KEYS = ("latents_sv",)
FEATURES_KEY = "feats_dino"
LABELS_KEY = "labels"


@dataclass(frozen=True)
class Piece:
    """One tensor of the cache over all shards, rows as plain bytes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """of one sample"""
    plain: list[np.ndarray]
    """per shard: (n, bytes of a row) uint8"""
    flipped: list[np.ndarray] | None

    def copy_rows(self, shards: list[int], rows: list[int], flip: list[bool], out: np.ndarray) -> None:
        """out[i] = row rows[i] of shard shards[i]; out: (B, bytes of a row) uint8."""
        if self.flipped is None or not any(flip):
            plain = self.plain
            for i, (shard, row) in enumerate(zip(shards, rows)):
                out[i] = plain[shard][row]
        else:
            sources = (self.plain, self.flipped)
            for i, (shard, row, mirrored) in enumerate(zip(shards, rows, flip)):
                out[i] = sources[mirrored][shard][row]


class LatentShards:
    """A cache of latents, of the released layout or ours (METHOD 6): the same safetensors files.

    paths: a folder, files, or a list of them; fsspec addresses (s3://, gs://, hf://, memory://) are copied into
    `cache_folder` first. Memory: the page cache, and nothing per sample.
    Raises ValueError naming the file where a shard is truncated, or differs from the first in keys, shapes or dtypes;
    FileNotFoundError where a file of the manifest is missing.
    """

    def __init__(self, paths: str | Path | Iterable[str | Path], *, cache_folder: str | Path | None = None):
        self.folder, self.paths = local_shards(paths, cache_folder)
        headers = [read_header(path) for path in self.paths]
        check_alike(self.paths, headers)
        self.metadata = headers[0].metadata
        first = headers[0].entries
        counts = [header.entries[LABELS_KEY].shape[0] for header in headers]
        self._ends = np.cumsum(counts)
        self._range = (0, int(self._ends[-1]))
        maps = [map_tensors(path, header) for path, header in zip(self.paths, headers)]
        self._labels = [tensors[LABELS_KEY].numpy() for tensors in maps]
        self._texture = [_piece(key, first[key], maps) for key in TEXTURE_KEYS if key in first]
        self._semantic = [_piece(key, first[key], maps) for key in SEMANTIC_KEYS if key in first]
        self._features = _piece(FEATURES_KEY, first[FEATURES_KEY], maps) if FEATURES_KEY in first else None
        self.dtype = self._texture[0].dtype
        self.grid = self._texture[0].shape[1:]
        self.texture_channels = sum(piece.shape[0] for piece in self._texture)
        self.semantic_channels = sum(piece.shape[0] for piece in self._semantic)
        self.has_flips = all(piece.flipped is not None for piece in self._texture + self._semantic)

    def __len__(self) -> int:
        return self._range[1] - self._range[0]

    @property
    def channels(self) -> int:
        return self.texture_channels + self.semantic_channels

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        """(F, h, w) of the stored VFM features, None where the cache has none."""
        return self._features.shape if self._features else None

    def slice(self, start: int, stop: int) -> "LatentShards":
        """The samples start .. stop - 1 as a set of their own (held-out data, a part of the set); shares the maps."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"samples {start} to {stop} are not within the {len(self)} samples of the cache")
        part = object.__new__(LatentShards)
        part.__dict__.update(self.__dict__)
        part._range = (self._range[0] + start, self._range[0] + stop)
        return part

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

    def gather(self, indices: Tensor, flip: Tensor) -> dict[str, Tensor]:
        """The stored values of some samples, copied.

        indices: (B,) int64 in 0 .. N - 1; flip: (B,) bool, which of them are read flipped.
        Returns {"texture": (B, C_t, H, W), "semantic": (B, C_s, H, W), "labels": (B,) int64} in the stored dtype, and
        "features" (B, F, h, w) where the cache has them.
        """
        slot = self._slot(len(indices), features=self._features is not None, pinned=False)
        self._fill(slot, indices, flip)
        texture, semantic = split_latents(slot["latents"], self.texture_channels)
        out = {"texture": texture, "semantic": semantic, "labels": slot["labels"]}
        return out | ({"features": slot["features"]} if "features" in slot else {})

    def _slot(self, size: int, *, features: bool, pinned: bool) -> dict[str, Tensor]:
        """Host memory for one batch; the latents are one raw composite."""
        slot = {
            "latents": torch.empty((size, self.channels, *self.grid), dtype=self.dtype, pin_memory=pinned),
            "labels": torch.empty(size, dtype=torch.int64, pin_memory=pinned),
            "sample_ids": torch.empty(size, dtype=torch.int64, pin_memory=pinned),
        }
        if features:
            shape = (size, *self._features.shape)
            slot["features"] = torch.empty(shape, dtype=self._features.dtype, pin_memory=pinned)
        return slot

    def _fill(self, slot: dict[str, Tensor], indices: Tensor, flip: Tensor) -> None:
        positions = indices.numpy()
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"sample indices {positions.min()} to {positions.max()}; there are {len(self)} samples")
        positions = positions + self._range[0]
        shard_numbers = np.searchsorted(self._ends, positions, side="right")
        starts = np.concatenate([[0], self._ends])[shard_numbers]
        shards, rows, flip_list = shard_numbers.tolist(), (positions - starts).tolist(), flip.tolist()
        streams = split_latents(slot["latents"], self.texture_channels)
        for stream, pieces in zip(streams, (self._texture, self._semantic)):
            channel = 0
            for piece in pieces:
                target = stream[:, channel : channel + piece.shape[0]]
                channel += piece.shape[0]
                piece.copy_rows(shards, rows, flip_list, _row_bytes(target))
        if "features" in slot:
            self._features.copy_rows(shards, rows, flip_list, _row_bytes(slot["features"]))
        slot["labels"].copy_(torch.tensor([int(self._labels[shard][row]) for shard, row in zip(shards, rows)]))


def _row_bytes(values: Tensor) -> np.ndarray:
    """(B, ...) whose samples are contiguous, as a (B, bytes of a sample) uint8 view."""
    return values.view(torch.uint8).flatten(1).numpy()


def _piece(key: str, entry: Entry, maps: list[dict[str, Tensor]]) -> Piece:
    def rows(name: str) -> list[np.ndarray]:
        return [tensors[name].view(torch.uint8).flatten(1).numpy() for tensors in maps]

    flipped = rows(f"{key}_flip") if f"{key}_flip" in maps[0] else None
    return Piece(key, entry.dtype, entry.shape[1:], rows(key), flipped)


def check_alike(paths: list[str], headers: list[Header]) -> None:
    """Raises ValueError naming the file that does not belong to the same cache as the first one."""
    first = headers[0]
    for name in (LABELS_KEY, TEXTURE_KEYS[0]):
        if name not in first.entries:
            raise ValueError(
                f"{paths[0]} has no tensor '{name}'; it holds {', '.join(first.entries) or 'nothing'}. A latent shard "
                "needs at least labels and latents"
            )
    streams = [first.entries[key] for key in TEXTURE_KEYS + SEMANTIC_KEYS if key in first.entries]
    if any(entry.dtype != streams[0].dtype or entry.shape[2:] != streams[0].shape[2:] for entry in streams):
        raise ValueError(
            f"{paths[0]}: texture and semantic latents must share dtype and grid, got "
            f"{[(entry.dtype, entry.shape) for entry in streams]}"
        )
    for path, header in zip(paths, headers):
        if header.entries.keys() != first.entries.keys():
            different = sorted(header.entries.keys() ^ first.entries.keys())
            raise ValueError(f"{path} does not belong to the cache of {paths[0]}: they differ in tensors {different}")
        count = header.entries[LABELS_KEY].shape[0]
        for name, entry in header.entries.items():
            reference = first.entries[name]
            if (entry.dtype, entry.shape[1:]) != (reference.dtype, reference.shape[1:]):
                raise ValueError(
                    f"{path} does not belong to the cache of {paths[0]}: '{name}' is {entry.dtype} {entry.shape[1:]} "
                    f"per sample, there {reference.dtype} {reference.shape[1:]}"
                )
            if entry.shape[0] != count:
                raise ValueError(f"{path}: '{name}' has {entry.shape[0]} samples but there are {count} labels")
        if header.metadata.get("fingerprint") != first.metadata.get("fingerprint"):
            raise ValueError(
                f"{path} was encoded with other settings than {paths[0]} (their fingerprints differ): two caches are "
                "mixed in one folder; keep each in its own"
            )


class LatentLoader:
    """Endless normalised batches in a seeded order that depends on nothing but the seed.

    Step k of a run takes the positions k * B_global .. (k + 1) * B_global - 1 of one endless sequence of epochs, each a
    permutation of the set (sfd_fast.data.order). Rank r takes the r-th equal slice: ranks are disjoint, together
    complete, and a batch may span two epochs, so no sample is dropped or repeated within an epoch whatever the sizes.
    The position is the step: resuming is start_step. num_workers threads gather (and on the CPU normalise) ahead;
    order and bytes do not depend on their number. On CUDA, slots are pinned and batch k + 1 is copied while k is used.

    Yields {"latents": (B, C, H, W) float32 normalised composite, "labels": (B,) int64, "sample_ids": (B,) int64 the
    position in the run}, and "features" (B, F, h, w) in the stored dtype where features=True.
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
                f"{shards.paths[0]} has no VFM features (feats_dino): encode them, use online or semvae targets, or "
                "set the REPA weight to 0"
            )
        self.shards, self.global_batch_size, self.seed = shards, global_batch_size, seed
        self.rank, self.world_size, self.step = rank, world_size, start_step
        self.statistics = shards.statistics() if statistics is None else statistics
        self.flip, self.shuffle, self.num_workers = flip, shuffle, num_workers
        self.features = shards.feature_shape is not None if features is None else features
        self.device = torch.device(device)
        self._scale, self._shift = (value.to(self.device) for value in self.statistics.scale_and_shift())
        if len(self._scale) != shards.channels:
            raise ValueError(
                f"statistics of {len(self._scale)} channels for latents of {shards.channels}: they come from different "
                "caches"
            )

    def positions(self, step: int) -> Tensor:
        """Positions in the run that this rank takes at a step, (B,) int64."""
        size = self.global_batch_size // self.world_size
        start = step * self.global_batch_size + self.rank * size
        return torch.arange(start, start + size)

    def indices(self, positions: Tensor) -> Tensor:
        """Samples of the set at positions of the run, (B,) int64."""
        if self.shuffle:
            return shuffled_indices(positions, len(self.shards), self.seed)
        return positions % len(self.shards)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches from the current step on; `step` counts the batches handed out."""
        with ThreadPoolExecutor(max(self.num_workers, 1), thread_name_prefix="latents") as pool:
            batches = self._on_device(pool) if self.device.type == "cuda" else self._on_host(pool)
            try:
                for batch in batches:
                    self.step += 1
                    yield batch
            finally:
                batches.close()

    def _on_host(self, pool: ThreadPoolExecutor) -> Iterator[dict[str, Tensor]]:
        def work(step: int, slot: dict[str, Tensor]) -> dict[str, Tensor]:
            self._gather(step, slot)
            fresh = {name: slot[name].clone() for name in slot if name != "latents"}
            return {"latents": torch.addcmul(self._shift, slot["latents"], self._scale)} | fresh

        for batch, _ in self._ordered(pool, work, pinned=False):
            yield batch

    def _on_device(self, pool: ThreadPoolExecutor) -> Iterator[dict[str, Tensor]]:
        stream = torch.cuda.Stream(self.device)
        waiting: deque[tuple[dict[str, Tensor], torch.cuda.Event]] = deque()

        def work(step: int, slot: dict) -> dict:
            if "copied" in slot:
                slot["copied"].synchronize()
            self._gather(step, slot)
            return slot

        def hand_out() -> dict[str, Tensor]:
            batch, copied = waiting.popleft()
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for value in batch.values():
                value.record_stream(current)
            return batch

        for slot, _ in self._ordered(pool, work, pinned=True):
            with torch.cuda.stream(stream):
                batch = {
                    name: slot[name].to(self.device, non_blocking=True)
                    for name in ("latents", "labels", "sample_ids", "features")
                    if name in slot
                }
                batch["latents"] = torch.addcmul(self._shift, batch["latents"], self._scale)
                slot["copied"] = stream.record_event()
            waiting.append((batch, slot["copied"]))
            if len(waiting) > 1:
                yield hand_out()

    def _ordered(self, pool: ThreadPoolExecutor, work, *, pinned: bool) -> Iterator[tuple[dict, int]]:
        """work(step, slot) for every step in order, up to num_workers of them ahead, over a ring of host slots."""
        size = self.global_batch_size // self.world_size
        slots = deque(
            self.shards._slot(size, features=self.features, pinned=pinned) for _ in range(self.num_workers + 2)
        )
        running: deque[tuple[int, Future, dict]] = deque()
        try:
            for step in count(self.step):
                slot = slots.popleft()
                slots.append(slot)
                if self.num_workers == 0:
                    yield work(step, slot), step
                    continue
                running.append((step, pool.submit(work, step, slot), slot))
                if len(running) > self.num_workers:
                    done, future, _ = running.popleft()
                    yield future.result(), done
        finally:
            for _, future, _ in running:
                future.cancel()

    def _gather(self, step: int, slot: dict[str, Tensor]) -> None:
        positions = self.positions(step)
        flip = flips(positions, self.seed) if self.flip else torch.zeros(len(positions), dtype=torch.bool)
        self.shards._fill(slot, self.indices(positions), flip)
        slot["sample_ids"].copy_(positions)
