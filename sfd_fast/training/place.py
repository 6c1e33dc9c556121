"""Which rank of how many this process is, by the environment that torchrun, deepspeed or SLURM's srun made."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from sfd_fast.config import TrainConfig, require


@dataclass(frozen=True)
class Place:
    """This process among the ranks of a run."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Place":
        """From the variables of torchrun and deepspeed, or of the SLURM step that srun started, or alone.

        The step's own variables count, not the job's: SLURM_NTASKS is set in the body of an sbatch script too, where
        one process runs and no other will come. Raises ValueError for ranks that are named by halves.
        """
        if "RANK" in environment:
            rank = int(environment["RANK"])
            return cls(rank, int(environment.get("LOCAL_RANK", rank)), int(environment.get("WORLD_SIZE", "1")))
        ranks = int(environment.get("WORLD_SIZE", "1"))
        require(
            ranks == 1,
            f"WORLD_SIZE is {ranks}, but RANK is not set: no launcher sets one without the other; start the ranks with "
            "torchrun, deepspeed or srun, or unset WORLD_SIZE",
        )
        tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
        if tasks > 1:
            return cls(int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"]), tasks)
        return cls(0, 0, 1)

    @classmethod
    def from_environment(cls) -> "Place":
        """As read(); sets the variables that DeepSpeed looks for where the launcher did not."""
        environment = os.environ
        place = cls.read(environment)
        if "RANK" not in environment:
            if place.world_size > 1:
                if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
                    for name, value in slurm_meeting_point(environment).items():
                        environment.setdefault(name, value)
            else:
                # a port of its own: two runs on one machine do not meet
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            environment |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size)}
        environment["LOCAL_RANK"] = str(place.local_rank)
        return place


def slurm_meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Address and port at which the ranks of a SLURM step find each other.

    Rank 0 runs on the first host of the step. (SLURM_LAUNCH_NODE_IPADDR would be the host that called srun, which may
    be a login node.) The port is made from job and step: steps of one job on one host do not meet.
    """
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    require(bool(hosts), "SLURM_STEP_NODELIST is not set: start the ranks with srun, or set MASTER_ADDR, MASTER_PORT")
    number = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    # below 32768, where the ports begin that the system hands out to others
    return {"MASTER_ADDR": first_host(hosts), "MASTER_PORT": str(15_000 + number % 15_000)}


def first_host(hosts: str) -> str:
    """The first host of a SLURM host list: "a[01-03,7]-b[2,4],c" -> "a01-b2".

    Read here rather than by `scontrol show hostnames`, which thousands of ranks would start at once, and which
    containers often lack.
    """
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", hosts)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def check_ranks(train: TrainConfig, place: Place) -> None:
    """Raises ValueError where several ranks were launched for the engine of one process: each would train alone."""
    require(
        train.engine == "deepspeed" or place.world_size == 1,
        f"train.engine 'torch' runs in one process, but {place.world_size} ranks were launched; set train.engine to "
        "'deepspeed'",
    )
