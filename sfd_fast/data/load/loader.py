"""Cached latents as one batched, seeded, endless sequence of normalised batches.

Letters: N samples of the set, B samples of a batch on this rank, C channels, H, W, F width and h, w grid of features.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor

from sfd_fast.data.load.latents import Batch, LatentShards
from sfd_fast.data.load.order import flips, shuffled_indices
from sfd_fast.data.load.rows import Places
from sfd_fast.diffusion.posterior import add_posterior_noise
from sfd_fast.diffusion.statistics import LatentStatistics, multiply_add
from sfd_fast.files.ahead import ahead

PLAN_STEPS = 16
"""steps whose order is computed together: some 50 bytes for each of their samples"""


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
        self.shards, self.global_batch_size, self.seed = shards, global_batch_size, seed
        self.rank, self.world_size, self.step = rank, world_size, start_step
        self.statistics = shards.statistics() if statistics is None else statistics
        self.flip, self.shuffle, self.num_workers = flip, shuffle, num_workers
        self.features = shards.feature_shape is not None if features is None else features
        shards.require(flip=flip, features=self.features)
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

        yield from ahead(work, count(self.step), num_threads=self.num_workers, depth=self.num_workers)

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

        yield from ahead(work, count(self.step), num_threads=self.num_workers, depth=self.num_workers)

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
