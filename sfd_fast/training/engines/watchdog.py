"""A thread that ends a rank which makes no progress, so that a hanging run costs minutes and leaves nothing behind."""

import faulthandler
import os
import sys
import threading
import time


class Watchdog:
    """Ends this process, with every thread's trace, where nothing calls beat() for timeout_s: no rank is left behind.

    It watches from the first beat() until stop(). Collectives of DeepSpeed's own groups wait for half an hour whatever
    the timeout; this does not.
    """

    def __init__(self, rank: int, timeout_s: float):
        self.rank, self.timeout_s = rank, timeout_s
        self.last = time.monotonic()
        self.stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def beat(self) -> None:
        self.last = time.monotonic()
        if self.thread is None:
            self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        self.stopped.set()
        if self.thread is not None:
            self.thread.join()

    def watch(self) -> None:
        while not self.stopped.wait(min(1.0, self.timeout_s / 10)):
            if time.monotonic() - self.last > self.timeout_s:
                sys.stderr.write(
                    f"rank {self.rank}: no step for {self.timeout_s:g} s (deepspeed.timeout_s): this rank hangs, or "
                    "waits for one that does; it ends now, and the run goes on from its last checkpoint when started "
                    "again\n"
                )
                faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                os._exit(1)
