"""The processes that prepare data together: one, or those of a launcher (torchrun, deepspeed)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

TIMEOUT = timedelta(days=7)
"""a rank may wait this long for the slowest one: shards take minutes, a whole data set hours"""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work. Work is divided by number: item i belongs to rank i mod size."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """What the launcher says in RANK, WORLD_SIZE, LOCAL_RANK; starts a gloo group where there is none."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT)
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, count: int) -> range:
        """The items of 0 .. count - 1 that belong to this rank: disjoint over ranks, together all."""
        return range(self.rank, count, self.size)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], None]) -> None:
        """Runs work on rank 0 while the others wait; an exception there is raised on every rank."""
        error: BaseException | None = None
        if self.first:
            try:
                work()
            except (ValueError, OSError) as caught:
                error = caught
        error = self.gather(error)[0]
        if error is not None:
            raise error

    def barrier(self) -> None:
        """Returns when every rank has arrived."""
        self.gather(None)
