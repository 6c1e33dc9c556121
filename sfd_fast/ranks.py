"""Who this process is among those that work together: ranks of torchrun, deepspeed, or SLURM's srun, or one alone."""

import itertools
import os
import pickle
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from sfd_fast.config import require

if TYPE_CHECKING:
    import torch

TIMEOUT = timedelta(minutes=30)
"""for the ranks to find each other, and for one exchange; meet() waits for the slowest as long as it lives"""
STALL_S, BEAT_S, POLL_S = 300.0, 5.0, 0.5
"""after how long a silent rank is said to have stopped; how often it is heard of; how often a waiting rank looks"""
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work. Work is divided by number: item i belongs to rank i mod size."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Ranks":
        """From the variables of torchrun and deepspeed, or of the SLURM step that srun started, or alone.

        The step's own variables count, not the job's: SLURM_NTASKS is set in the body of an sbatch script too, where
        one process runs and no other will come. Raises ValueError for ranks that are named by halves, or contradict.
        """
        if "RANK" in environment:
            rank, world_size = int(environment["RANK"]), int(environment.get("WORLD_SIZE", "1"))
            require(
                0 <= rank < world_size, f"RANK {rank} must be in [0, WORLD_SIZE = {world_size}): check the launcher"
            )
            return cls(rank, world_size, int(environment.get("LOCAL_RANK", rank)))
        world_size = int(environment.get("WORLD_SIZE", "1"))
        require(
            world_size == 1,
            f"WORLD_SIZE is {world_size}, but RANK is not set: no launcher sets one without the other; start the ranks "
            "with torchrun, deepspeed or srun, or unset WORLD_SIZE",
        )
        tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
        if tasks > 1:
            return cls(int(environment["SLURM_PROCID"]), tasks, int(environment["SLURM_LOCALID"]))
        return cls()

    @classmethod
    def announce(cls) -> "Ranks":
        """As read(); sets the variables that torch.distributed and DeepSpeed look for where no launcher did."""
        environment = os.environ
        ranks = cls.read(environment)
        if "RANK" not in environment:
            if ranks.world_size > 1:
                if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
                    for name, value in slurm_meeting_point(environment).items():
                        environment.setdefault(name, value)
            else:
                # a port of its own: two runs on one machine do not meet
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            environment |= {"RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.world_size)}
        environment["LOCAL_RANK"] = str(ranks.local_rank)
        return ranks

    @classmethod
    def join(cls) -> "Ranks":
        """As read(); of several ranks, starts the gloo group through which they meet, where there is none yet."""
        ranks = cls.read()
        if ranks.world_size > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                cls.announce()
                dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size, timeout=TIMEOUT)
        return ranks

    @classmethod
    def of_group(cls) -> "Ranks":
        """The ranks of the process group that is there already; one process where there is none."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))

    def device(self, name: str = "auto") -> "torch.device":
        """The device called `name`; one of CUDA has its number and is the current one from now on.

        auto, or empty: cuda where torch sees one, else the CPU. cuda: the only GPU that this rank sees (SLURM often
        shows each rank its own, and always as number 0), or else number `local_rank`. cuda:N, cpu: as they say.
        Raises ValueError for a CUDA device that is not there.
        """
        import torch

        kind, _, number = name.partition(":")
        if kind in ("auto", ""):
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        if kind != "cuda":
            return torch.device(kind)
        require(torch.cuda.is_available(), f"device {name} needs a CUDA device, and torch sees none: choose cpu")
        require(number == "" or number.isdecimal(), f"device '{name}' is unknown; choose auto, cpu, cuda or cuda:N")
        count = torch.cuda.device_count()
        index = int(number) if number else (self.local_rank if count > 1 else 0)
        require(
            index < count,
            f"CUDA device {index} is not there: this process sees {count}; start at most {count} process(es) here",
        )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, count: int) -> range:
        """The items of 0 .. count - 1 that belong to this rank: disjoint over ranks, together all."""
        return range(self.rank, count, self.world_size)

    def share(self, count: int) -> range:
        """This rank's stretch of 0 .. count - 1: stretches in the order of ranks give all items in order."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    @contextmanager
    def together(self) -> Iterator[None]:
        """While the block runs, the other ranks learn of this one's failure, and notice where it stops."""
        if self.world_size == 1:
            yield
            return
        store, ended = default_store(), threading.Event()

        def beat() -> None:
            for number in itertools.count():
                try:
                    store.set(f"sfd/beat/{self.rank}", str(number))
                except RuntimeError:  # rank 0 keeps the store, and has ended
                    return
                if ended.wait(BEAT_S):
                    return

        thread = threading.Thread(target=beat, name="beat", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError):
                store.compare_set("sfd/failed", "", f"rank {self.rank} failed: {type(error).__name__}: {error}")
            raise
        finally:
            ended.set()
            thread.join()

    def check(self) -> None:
        """Raises OSError where another rank has failed."""
        if self.world_size > 1:
            try:
                store = default_store()
                failed = store.get("sfd/failed").decode() if store.check(["sfd/failed"]) else ""
            except RuntimeError:
                raise OSError("rank 0 has ended, which the others meet through; its own message says why") from None
            if failed:
                raise OSError(f"{failed.splitlines()[0]}; this rank ({self.rank}) stops too")

    def meet(self) -> None:
        """Returns when every rank has arrived. Raises OSError where one has failed, or naming one that has stopped."""
        if self.world_size == 1:
            return
        self.check()
        store = default_store()
        turn = store.add(f"sfd/turn/{self.rank}", 1)
        here = [f"sfd/met/{turn}/{rank}" for rank in range(self.world_size)]
        store.set(here[self.rank], "")
        beats: dict[int, tuple[bytes, float]] = {}
        pause = 0.001
        while not store.check(here):
            time.sleep(pause)
            pause = min(2 * pause, POLL_S)
            self.check()
            if pause < POLL_S:
                continue
            for rank, key in enumerate(here):
                beat = f"sfd/beat/{rank}"
                if store.check([key]) or not store.check([beat]):  # who never entered together() has no beat
                    continue
                value, now = store.get(beat), time.monotonic()
                if beats.setdefault(rank, (value, now))[0] != value:
                    beats[rank] = (value, now)
                elif now - beats[rank][1] > STALL_S:
                    raise OSError(
                        f"rank {rank} of {self.world_size} has been silent for {STALL_S:g} s: it has stopped, or "
                        "its machine is gone; end the ranks and run the same command again"
                    )

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank. Raises as meet()."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        self.meet()
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Runs work on rank 0; its result, or its exception, reaches every rank, so that none waits in vain.

        An exception is raised as its own kind, where that can be sent. Raises as meet() where another rank fails.
        """
        if self.world_size == 1:
            return work()
        import torch.distributed as dist

        result, failure, sent = None, None, [None, None]
        if self.first:
            try:
                sent[0] = result = work()
            except Exception as error:
                failure, sent = error, [None, portable(error)]
        self.meet()
        dist.broadcast_object_list(sent, src=0)
        if failure is not None or sent[1] is not None:
            raise failure or sent[1]
        return result if self.first else sent[0]



def default_store() -> "torch.distributed.Store":
    """The key-value store through which the process group was made."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def launch_name(environment: Mapping[str, str] = os.environ) -> str | None:
    """What the ranks of one launch have in common, and those of another have not; None for a process alone.

    Ranks that were started by hand, without an address to meet at, are told apart by their number only.
    """
    world_size = Ranks.read(environment).world_size
    if world_size == 1:
        return None
    if "RANK" not in environment:
        return f"SLURM step {environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if address in ("localhost", "127.0.0.1", "::1"):  # of each machine its own
        address = socket.gethostname()
    return f"{world_size} ranks {environment.get('TORCHELASTIC_RUN_ID', '')} {address}:{port}"


def portable(error: Exception) -> Exception:
    """The exception as other processes can unpickle it: its own kind where that is possible."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever its kind's own code raises
        pass
    return RuntimeError(f"{type(error).__name__} on rank 0: {error}")


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
