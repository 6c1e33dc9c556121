"""The counters of a run in progress: what a checkpoint stores of them, and the rows that they become."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from sfd_fast.config import to_dict
from sfd_fast.files.messages import first_line
from sfd_fast.training.engines.interface import OVERFLOW, Batch, Engine, StepResult
from sfd_fast.training.job import Job
from sfd_fast.training.run.directory import num_threads
from sfd_fast.training.run.log import GradNormWatch, RunLog, StepLog, memory_gib


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Run:
    """The counters of a run in progress, and what a checkpoint stores of them."""

    def __init__(self, job: Job, engine: Engine):
        self.job, self.engine = job, engine
        # a divisor of neither would delay the count of bad steps past max_bad_steps
        self.read_every = min(job.run.log_every, job.train.max_bad_steps)
        names = ["loss", *job.terms, "grad_norm"]
        self.steps = StepLog(names, self.read_every, engine.device, num_bins=job.num_bins)
        self.norms = GradNormWatch(job.run.spike_factor)
        self.bad_in_row = 0
        self.skipped = 0
        self.step = 0
        self.wall_s = 0.0
        self.changes: list[dict] = []
        """what was changed on purpose, and at which step"""

    def state(self) -> dict:
        return {
            "config": to_dict(self.job.config),
            "identity": self.job.identity,
            "record": self.job.record,
            "world_size": self.engine.world_size,
            "threads": num_threads(),
            "changes": self.changes,
            "bad_in_row": self.bad_in_row,
            "skipped": self.skipped,
            "wall_s": self.wall_s,
            "interval": self.steps.state(self.engine.sum_over_ranks),
            "recent_norms": self.norms.recent,
        }

    def restore(self, state: dict, source: Path) -> None:
        """Takes over a checkpoint's counters; ValueError with the name of their file where they are none."""
        try:
            self.step, self.changes = state["step"], state["changes"]
            self.bad_in_row, self.skipped, self.wall_s = state["bad_in_row"], state["skipped"], state["wall_s"]
            self.norms.recent = [float(norm) for norm in state["recent_norms"]]
            self.steps.restore(state["interval"], leader=self.engine.rank == 0)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            raise ValueError(f"{source} holds no counters of a run: {first_line(error)}") from None

    def record(self, batch: Batch, result: StepResult) -> None:
        """Adds a step's results to the device-side log: no host read."""
        terms = {n: torch.cat([t[n] for t in result.terms]) for n in self.job.terms}
        self.steps.add([result.loss, *(t.mean() for t in terms.values()), result.grad_norm], result.skipped)
        if self.job.bins is not None:
            self.steps.add_bins(self.job.bins(batch), sum(terms.values()), result.skipped)

    def read(self, log: RunLog) -> None:
        """Reads the steps since the last read; counts and says bad steps and spikes. Raises NonFiniteError."""
        first = self.step - self.steps.filled + 1
        for step, row in enumerate(self.steps.read(self.engine.mean_over_ranks), start=first):
            *values, bad = row
            if bad == OVERFLOW:
                self.skipped += 1
                log.event(step, "gradients overflow fp16 at this loss scale: step skipped, the scale is lowered")
                continue
            if bad:
                self.skipped += 1
                self.bad_in_row += 1
                flaw = self.flaw(step)
                log.event(
                    step, f"loss {values[0]:g} or gradient norm {values[-1]:g} is not finite: step skipped{flaw}"
                )
                if self.bad_in_row >= self.job.train.max_bad_steps:
                    raise NonFiniteError(
                        f"{self.bad_in_row} steps in a row, up to step {step}, had a loss or gradient that was not "
                        "finite. Weights, moments and averages are as before them, and the last checkpoint is "
                        "intact. Look for NaN in the data (`sfd inspect PATH --verify`), lower optimizer.lr, or set "
                        f"optimizer.max_grad_norm; train.max_bad_steps is the limit{flaw}"
                    )
                continue
            self.bad_in_row = 0
            median = self.norms.spike(values[-1])
            if median is not None:
                log.event(step, f"gradient norm {values[-1]:.4g} is a spike: the median is {median:.4g}")

    def flaw(self, step: int) -> str:
        """What in the data is to blame for a bad step, as the end of a message; rank 0 looks at all ranks' samples."""
        found = self.job.flaw(step - 1) if self.job.flaw is not None and self.engine.rank == 0 else ""
        return f". The data are at fault: {found}" if found else ""


class Clock:
    """Seconds of training since the last row, less validation and checkpoints, and how many went into data waits."""

    def __init__(self, wall_s: float) -> None:
        self.before_s, self.begin = wall_s, time.perf_counter()
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()
        self.paused = self.waited = 0.0
        self.steps = 0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start - self.paused

    @property
    def wall_s(self) -> float:
        """Seconds of all training of this run, earlier starts included."""
        return self.before_s + time.perf_counter() - self.begin


def log_row(run: Run, log: RunLog, clock: Clock, lr: float) -> None:
    """The row of the steps since the last one."""
    job, engine = run.job, run.engine
    means = run.steps.means()
    seconds = max(clock.seconds, 1e-9)
    images_per_s = clock.steps * job.train.global_batch_size / seconds
    row = means | {
        "lr": lr,
        "images_per_s": images_per_s,
        "data_wait": clock.waited / seconds,
        "skipped": run.skipped,
        "wall_s": run.wall_s,
    }
    if job.num_samples:
        row["epoch"] = run.step * job.train.global_batch_size / job.num_samples
    if job.flops_per_sample:
        row["tflops"] = images_per_s * job.flops_per_sample / 1e12
        if job.run.peak_tflops:
            row["mfu"] = row["tflops"] / (job.run.peak_tflops * engine.world_size)
    row["memory_gib"] = engine.max_over_ranks(memory_gib(engine.device))
    if job.num_bins:
        row["loss_by_clock"] = run.steps.bin_means(engine.sum_over_ranks)
    log.row("train", run.step, row)
    log.show(loss=f"{means['loss']:.4f}", images_per_s=f"{images_per_s:.1f}")
    clock.restart()
