"""When a run is asked to stop before its end: by a signal, or by a file in its directory."""

import signal
import threading
import time
from pathlib import Path

STOP_FILE = "STOP"


class Stop:
    """Remembers SIGTERM, SIGUSR1 and the file STOP; inside the main thread it handles the signals while active.

    One rank looks for the file, and the others hear of it as they hear of a signal to one of them (Engine.any_rank).
    """

    look_every_s = 1.0
    """how often the file is looked for: a run directory may lie on a slow network"""

    def __init__(self, folder: Path, *, look: bool = True):
        self.file = folder / STOP_FILE
        self.look = look
        self.reason = ""
        self.checked = 0.0
        self.previous: dict = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self.previous[number] = signal.signal(number, self.remember)
        return self

    def remember(self, number: int, frame: object) -> None:
        self.reason = signal.Signals(number).name

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        now = time.monotonic()
        if self.look and not self.reason and now - self.checked >= self.look_every_s:
            self.checked = now
            if self.file.exists():
                self.reason = f"the file {STOP_FILE}"
        return bool(self.reason)
