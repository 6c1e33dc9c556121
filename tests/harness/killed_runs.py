"""A run that is killed at random moments and started again until it ends, beside one that is never killed.

`python killed_runs.py DATA OUT KILLS SEED [key=value...]` trains OUT-unbroken here, then OUT in forked children,
none of which pays for imports; each is killed at a random moment after a random step. The last line on stdout is the
number of kills.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from harness.tiny_run import tiny_config
from sfd_fast.training.diffusion import run_train


def attempt(config) -> int:
    """Starts a child that trains; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = run_train(config, device="cpu", progress=False).exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def wait_for(pointer: Path, step: float, child: int) -> None:
    """Until the last complete checkpoint has reached a step: progress, not time, spaces the kills on a busy machine."""
    while not (pointer.exists() and (name := pointer.read_text()).isdigit() and int(name) >= step):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)


def main() -> None:
    data, out, kills, seed, *settings = sys.argv[1:]
    torch.set_num_threads(1)
    train = {key: int(value) for key, value in (setting.split("=") for setting in settings)}
    start = time.monotonic()
    reference = tiny_config(data, f"{out}-unbroken", **train)
    _, status = os.waitpid(attempt(reference), 0)  # a child too: a process that has trained cannot fork safely
    if status:
        raise SystemExit("the unbroken run failed")
    step_s = (time.monotonic() - start) / reference.train.max_steps
    draw = random.Random(int(seed))
    config = tiny_config(data, out, **train)
    segment = reference.train.max_steps / (int(kills) + 1)
    done = 0
    while True:
        child = attempt(config)
        if done < int(kills):
            wait_for(Path(out) / "checkpoints" / "latest", draw.uniform(done, done + 0.7) * segment, child)
            time.sleep(draw.uniform(0, 2.5) * step_s)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            done += 1
        elif os.WEXITSTATUS(status):
            raise SystemExit(f"a run ended with exit code {os.WEXITSTATUS(status)} after {done} kills")
        else:
            break
    print(done)


if __name__ == "__main__":
    main()
