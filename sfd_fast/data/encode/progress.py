"""How far a long job has come: one line now and then."""

import time
from collections.abc import Callable

from sfd_fast.ranks import Ranks

INTERVAL_S = 10.0


class Progress:
    """Images per second and time left, reported by rank 0."""

    def __init__(self, total: int, ranks: Ranks, report: Callable[[str], None]):
        self.total, self.ranks, self.report = total, ranks, report
        self.done, self.start = 0, time.monotonic()
        self.last = self.start

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if not self.ranks.first or (now - self.last < INTERVAL_S and self.done < self.total):
            return
        self.last = now
        rate = self.done / max(now - self.start, 1e-9)
        left = round((self.total - self.done) / rate)
        size = self.ranks.world_size
        self.report(
            f"{self.done}/{self.total} images of rank 0, {rate * size:.1f} images/s on {size} rank(s), "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )
