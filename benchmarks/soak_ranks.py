"""Ranks of the long proofs: started as programs or as forked children, on gloo, and waited for."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS)]


def row(name: str, value: float, unit: str, bar: float | None, holds: bool | None, note: str = "") -> dict:
    made = {"name": name, "value": value, "unit": unit, "bar": bar, "holds": holds}
    return made | {"note": note} if note else made


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(world_size: int, *arguments: object) -> None:
    """The program on so many ranks, waited for. Raises RuntimeError with a rank's last words."""
    port = free_port()
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | rank_environment(rank, world_size, port) | {"PYTHONPATH": path},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    words = [rank.communicate()[1] for rank in ranks]
    for rank, said in zip(ranks, words):
        if rank.returncode:
            raise RuntimeError(f"a rank ended with {rank.returncode}: {said[-3000:]}")
