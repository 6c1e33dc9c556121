"""Runs of two ranks, each killed (-9) once at a random moment and started again, against runs never killed.

`python soak_kills.py FOLDER KILLS`: FOLDER/data holds the shards; the result goes to FOLDER/kills.json.
"""

# ruff: noqa: I001 (soak_ranks comes before torch's neighbours: it makes the helpers of tests/ importable)

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from soak_ranks import free_port, launch, rank_environment, row

import torch
from harness.deepspeed_ranks import NOT_PERSISTENT, config
from safetensors.torch import load_file
from sfd_fast.config import SFDConfig
from sfd_fast.training.checkpoints import TEMPORARY
from sfd_fast.training.engines.deepspeed import LostRankError
from sfd_fast.training.diffusion import run_train

KILLS = 20
KINDS = ((2, "fp32"), (3, "fp32"), (1, "bf16"))
"""ZeRO stages and precisions in turn"""
MAX_STEPS = 40
AIMED = 3
"""every so many-th kill waits for a checkpoint that is being written"""


def kill_config(folder: Path, name: str, kind: tuple[int, str]) -> SFDConfig:
    """Two ranks, a checkpoint every other step: much of the time goes into writing them."""
    stage, precision = kind
    settings = {"max_steps": MAX_STEPS, "checkpoint_every": 2, "log_every": 20, "precision": precision}
    return config(folder, name, stage, NOT_PERSISTENT if stage == 3 else None, **settings)


def fork_ranks(made: SFDConfig) -> list[int]:
    """Two ranks as children of this process, which has imported everything already."""
    port = free_port()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ.update(rank_environment(rank, 2, port))
                torch.set_num_threads(1)
                with open(os.devnull, "w") as nothing:
                    os.dup2(nothing.fileno(), 2)
                status = run_train(made, device="cpu", progress=False).exit_code
            except LostRankError:
                status = 3
            finally:
                os._exit(status)
        children.append(child)
    return children


def finish(children: list[int]) -> list[int]:
    return [os.waitpid(child, 0)[1] for child in children]


def killing(folder: Path, kills: int) -> None:
    """One run for each kill, killed once while it lived, then started again until it ends: once, if all is well."""
    import deepspeed  # noqa: F401 (before the forks)

    wanted, step_s = {}, {}
    for kind in KINDS:
        start = time.monotonic()
        made = kill_config(folder, f"unbroken-{kind[0]}-{kind[1]}", kind)
        assert finish(fork_ranks(made)) == [0, 0]
        step_s[kind] = (time.monotonic() - start) / MAX_STEPS
        wanted[kind] = final_state(Path(made.run.out))
    draw = random.Random(0)
    out = []
    for number in range(kills):
        kind = KINDS[number % len(KINDS)]
        made = kill_config(folder, f"killed-{number}", kind)
        run = Path(made.run.out)
        draws = 0
        while True:
            draws += 1
            found = kill(made, draw, step_s[kind], aimed=number % AIMED == 0)
            if found["killed"]:
                break
            shutil.rmtree(run)  # it had ended before: not a kill, draw again
            if draws == 10:
                raise RuntimeError(f"ten runs of {kind} ended before they were killed")
        attempts = 1
        while finish(fork_ranks(made)) != [0, 0] and attempts < 3:
            attempts += 1
        state = final_state(run)
        same = state.keys() == wanted[kind].keys() and all(torch.equal(state[k], wanted[kind][k]) for k in state)
        out.append(found | {"kind": kind, "draws": draws, "attempts": attempts, "same": same})
        shutil.rmtree(run)
    (folder / "kills.json").write_text(json.dumps(out))


def kill(made: SFDConfig, draw: random.Random, step_s: float, *, aimed: bool) -> dict:
    """Starts the run and kills one rank or both: after a random step and a random part of two steps, or, where aimed,
    while a checkpoint is being written. Returns how many were killed alive, and whether a write was cut.
    """
    checkpoints = Path(made.run.out) / "checkpoints"
    children = fork_ranks(made)
    wait_for_step(checkpoints, draw.randrange(0, MAX_STEPS - 8, 2), children)
    if aimed:
        deadline = time.monotonic() + 60
        while not writing(checkpoints) and alive(children) and time.monotonic() < deadline:
            time.sleep(0.0002)
    else:
        time.sleep(draw.uniform(0.0, 2.0) * step_s)
    victims = draw.choice([children[:1], children[1:], children])
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    cut = writing(checkpoints)
    ends = finish(children)
    killed = sum(os.WIFSIGNALED(end) for end in ends)
    return {"killed": killed, "victims": len(victims), "cut": cut and killed > 0}


def writing(checkpoints: Path) -> bool:
    """Whether a checkpoint is half written now."""
    return any(checkpoints.glob(f"{TEMPORARY}*"))


def alive(children: list[int]) -> bool:
    """Whether no rank has ended; none is reaped."""
    asked = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return not any(os.waitid(os.P_PID, child, asked) for child in children)


def wait_for_step(checkpoints: Path, step: int, children: list[int]) -> None:
    """Returns when the run's newest checkpoint is of that step or later, or a rank has ended; 0 is the start."""
    pointer, deadline = checkpoints / "latest", time.monotonic() + 120
    while step and alive(children) and time.monotonic() < deadline:
        if pointer.is_file() and (name := pointer.read_text()).isdigit() and int(name) >= step:
            return
        time.sleep(0.001)


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every rank's last state, and the exported model."""
    found = {}
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    for path in [*sorted(latest.glob("*.safetensors")), run / "model" / "model.safetensors"]:
        found |= {f"{path.name}:{name}": value for name, value in load_file(path).items()}
    return found


def compare_kills(folder: Path, kills: int = KILLS) -> list[dict]:
    launch(1, __file__, folder, kills)
    found = json.loads((folder / "kills.json").read_text())
    same, cut = sum(f["same"] for f in found), sum(f["cut"] for f in found)
    attempts = max(f["attempts"] for f in found)
    kinds = ", ".join(f"ZeRO {stage} {precision}" for stage, precision in KINDS)
    note = (
        f"{kinds} in turn, {MAX_STEPS} steps, a checkpoint every other one; all were alive when killed "
        f"({sum(f['draws'] for f in found) - kills} that had ended before were drawn again); "
        f"{sum(f['victims'] == 1 for f in found)} lost one rank, the others both"
    )
    return [
        row(f"runs of two ranks killed at random, same final bits, of {kills}", same, "runs", kills, same == kills,
            note),
        row("starts that a killed run needed to end, at most", attempts, "starts", 1, attempts == 1),
        row(f"kills that cut a checkpoint's writing, of {kills}", cut, "kills", 1, cut >= 1),
    ]  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    killing(Path(sys.argv[1]), int(sys.argv[2]))
