"""What the parts of gpu_check share: rows, the time that is left, timers that claim nothing in a rehearsal."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import Timing, device_time


class TimeIsOver(Exception):
    """A part's time ended within a piece of work."""


class Part:
    """Rows of one part, written to `path` after each.

    rehearse: everything runs once on a CPU at tiny sizes, and no row holds a measured number.
    """

    def __init__(self, path: Path, seconds: float, *, rehearse: bool) -> None:
        self.path, self.rehearse = path, rehearse
        self.device = "cpu" if rehearse else "cuda"
        self.until = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.depth = 0

    @property
    def left(self) -> float:
        """Seconds until this part must have ended."""
        return self.until - time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        fresh = self.path.with_suffix(".writing")
        fresh.write_text(json.dumps(self.rows))
        os.replace(fresh, self.path)

    def fact(self, name: str, value: Any, unit: str = "") -> None:
        """Something read, not measured; it stands in a rehearsal too."""
        self.add({"name": name, "value": value, "unit": unit})

    def measured(self, name: str, value: float | None, unit: str, **more: Any) -> None:
        """A measured number; None in a rehearsal, and so are the numbers beside it."""
        if self.rehearse:
            value, more = None, {key: None if isinstance(v, float) else v for key, v in more.items()}
        self.add({"name": name, "value": value, "unit": unit, **more})

    def timed(self, name: str, timing: Timing, **more: Any) -> None:
        self.measured(name, timing.median, "ms", low=timing.low, high=timing.high, **more)

    def checked(self, name: str, holds: bool, note: str = "") -> None:
        self.add({"name": name, "value": None, "unit": "", "holds": bool(holds), "note": note})

    def skipped(self, name: str, reason: str) -> None:
        self.add({"name": name, "value": None, "unit": "", "note": f"not run: {reason}"})

    def attempt(self, name: str, work: Callable[[], None], *, seconds: float = 0.0) -> None:
        """work(), unless fewer than `seconds` are left; an error of it becomes a row that does not hold.

        Work that is not done when the part's time is over is broken off, and that becomes a row. Main thread only.
        """
        if self.left < max(seconds, 0.1):
            self.skipped(name, f"{max(self.left, 0):.0f} s were left, and this takes about {seconds:.0f} s")
            return
        try:
            self._within_time(work)
        except Exception as error:  # whatever a library raises: the other rows are worth having
            if self.left <= 0:
                self.skipped(name, "not ready when the time of this part was over")
            else:
                text = str(error).strip() or "no message"
                self.checked(name, False, f"{type(error).__name__}: {text.splitlines()[0]}")

    def _within_time(self, work: Callable[[], None]) -> None:
        """Compilers run for a minute where they like: an alarm ends them."""

        def over(*_: Any) -> None:
            raise TimeIsOver

        if self.depth == 0:
            signal.signal(signal.SIGALRM, over)
            signal.setitimer(signal.ITIMER_REAL, self.left)
        self.depth += 1
        try:
            work()
        finally:
            self.depth -= 1
            if self.depth == 0:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def device_time(self, function: Callable[[], Any]) -> Timing:
        """Device time of function; in a rehearsal one call and a number that `measured` drops."""
        if not self.rehearse:
            return device_time(function, rep_ms=50)
        function()
        return Timing(1.0, 1.0, 1.0)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
