"""A run that is killed at random moments and started again until it ends, beside one that is never killed.

`python killed_runs.py DATA OUT KILLS SEED [key=value...]` trains OUT-unbroken here, then OUT in forked children,
none of which pays for imports. The last line on stdout is the number of kills.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_run import tiny_config

from sfd_fast.training.loop import run_train


def attempt(config) -> int:
    """Starts a child that trains; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = run_train(config, device="cpu", progress=False).exit_code
        finally:
            os._exit(status)
    return child


def main() -> None:
    data, out, kills, seed, *settings = sys.argv[1:]
    torch.set_num_threads(1)
    train = {key: int(value) for key, value in (setting.split("=") for setting in settings)}
    start = time.monotonic()
    run_train(tiny_config(data, f"{out}-unbroken", **train), device="cpu", progress=False)
    whole = time.monotonic() - start
    draw = random.Random(int(seed))
    config = tiny_config(data, out, **train)
    done, patience = 0, 0.1
    while True:
        child = attempt(config)
        if done < int(kills):
            time.sleep(draw.uniform(0.02, patience) * whole)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            done += 1
            if not (Path(out) / "checkpoints" / "latest").exists():
                patience *= 1.5  # a busy machine starts slowly: kills must not all fall before the first checkpoint
        elif os.WEXITSTATUS(status):
            raise SystemExit(f"a run ended with exit code {os.WEXITSTATUS(status)} after {done} kills")
        else:
            break
    print(done)


if __name__ == "__main__":
    main()
