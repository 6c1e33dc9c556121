"""Ranks of the long proofs: started as programs or as forked children, on gloo, and waited for."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
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
        "MALLOC_MMAP_THRESHOLD_": "1000000",  # large blocks go back to the system when freed: ranks share its memory
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(world_size: int, *arguments: object) -> None:
    """The program on so many ranks, waited for. Raises RuntimeError with a rank's last words."""
    port = free_port()
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    with contextlib.ExitStack() as files:
        # files, not pipes: a rank whose pipe is full of warnings would wait, and the others for it
        errors = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world_size)]
        ranks = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=os.environ | rank_environment(rank, world_size, port) | {"PYTHONPATH": path},
                stdout=subprocess.DEVNULL, stderr=errors[rank],
            )
            for rank in range(world_size)
        ]  # fmt: skip
        for rank, said in zip(ranks, errors):
            if rank.wait():
                said.seek(0)
                raise RuntimeError(f"a rank ended with {rank.returncode}: {said.read()[-3000:]}")
