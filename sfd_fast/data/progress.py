"""How far a long job has come: a bar on a terminal, elsewhere one line now and then."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from sfd_fast.ranks import Ranks

INTERVAL_S = 10.0


class Progress:
    """Images per second and time left, told by rank 0. what: the job's name in front of every line."""

    def __init__(self, what: str, total: int, ranks: Ranks, report: Callable[[str], None]):
        self.what, self.total, self.ranks, self.report = what, total, ranks, report
        self.done, self.start = 0, time.monotonic()
        self.last = self.start
        self.bar = tqdm(
            desc=what, total=total, unit="img", disable=not (ranks.first and total and sys.stderr.isatty())
        )

    def add(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        if self.done >= self.total:
            self.bar.close()
        now = time.monotonic()
        due = now - self.last >= INTERVAL_S or self.done >= self.total
        if not self.ranks.first or not due or not self.bar.disable:
            return
        self.last = now
        rate = self.done / max(now - self.start, 1e-9)
        left = round((self.total - self.done) / rate)
        size = self.ranks.world_size
        self.report(
            f"{self.what}: {self.done}/{self.total} images of rank 0, {rate * size:.1f} images/s on {size} rank(s), "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )
