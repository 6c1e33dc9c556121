"""The training loop: one function for every engine and every network.

    <out>/config.json  metrics.jsonl  tensorboard/  checkpoints/  model/   (model: averaged weights, ready to sample)
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sfd_fast.config import TrainConfig, require, to_dict
from sfd_fast.files.atomic import replace_folder
from sfd_fast.ranks import Ranks
from sfd_fast.training.checkpoints import Checkpoints
from sfd_fast.training.engines.interface import OVERFLOW, Batch, Engine, TorchEngine, batch_size, together
from sfd_fast.training.job import Job
from sfd_fast.training.optimizer import learning_rate
from sfd_fast.training.run.directory import prepare_directory, resume_point
from sfd_fast.training.run.log import GradNormWatch, RunLog, StepLog, memory_gib
from sfd_fast.training.run.stop import Stop
from sfd_fast.training.run.trace import Trace

PREEMPTED = 75
"""exit code of a run that saved and stopped on a signal or a STOP file (EX_TEMPFAIL: start it again)"""


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or gradient that was not finite."""


@dataclass
class TrainResult:
    """How a run ended."""

    directory: Path
    step: int
    model: Path | None
    """folder of the averaged weights, None where the run was stopped before its end"""
    metrics: list[dict] = field(default_factory=list)
    """rows of metrics.jsonl"""
    preempted: bool = False

    @property
    def loss(self) -> float:
        """The last logged training loss."""
        losses = [row["loss"] for row in self.metrics if row["kind"] == "train"]
        return losses[-1] if losses else math.nan

    @property
    def exit_code(self) -> int:
        return PREEMPTED if self.preempted else 0


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """The batch in pieces of `size` samples (0: in one piece); the last may be smaller."""
    total = batch_size(batch)
    if size == 0 or size >= total:
        return [batch]
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, total, size)]


class Run:
    """The counters of a run in progress, and what a checkpoint stores of them."""

    def __init__(self, job: Job, engine: Engine):
        train = job.train
        self.job, self.engine = job, engine
        # a divisor of neither would delay the count of bad steps past max_bad_steps
        self.read_every = min(job.run.log_every, train.max_bad_steps)
        names = ["loss", *job.terms, "grad_norm"]
        self.steps = StepLog(names, self.read_every, engine.device, num_bins=job.num_bins)
        self.norms = GradNormWatch(job.run.spike_factor)
        self.bad_in_row = 0
        self.skipped = 0
        self.step = 0
        self.wall_s = 0.0

    def state(self) -> dict:
        return {
            "config": to_dict(self.job.config),
            "identity": self.job.identity,
            "record": self.job.record,
            "world_size": self.engine.world_size,
            "bad_in_row": self.bad_in_row,
            "skipped": self.skipped,
            "wall_s": self.wall_s,
            "interval": self.steps.state(self.engine.sum_over_ranks),
            "recent_norms": self.norms.recent,
        }

    def restore(self, state: dict) -> None:
        self.step = state["step"]
        self.bad_in_row, self.skipped, self.wall_s = state["bad_in_row"], state["skipped"], state["wall_s"]
        self.norms.recent = state["recent_norms"]
        self.steps.restore(state["interval"], leader=self.engine.rank == 0)

    def record(self, batch: Batch, result) -> None:
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

    def __init__(self) -> None:
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

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start - self.paused


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


def due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def run_job(job: Job, engine: Engine, *, resume: bool = True, progress: bool = True) -> TrainResult:
    """Trains job.model from the latest checkpoint, or from the start, to train.max_steps; closes the engine.

    Raises ValueError for a checkpoint of another configuration or other data, NonFiniteError after max_bad_steps bad
    steps in a row, OSError where the run directory or a checkpoint cannot be written; earlier checkpoints stay intact.
    """
    try:
        return train_job(job, engine, resume=resume, progress=progress)
    except RuntimeError as error:
        explained = engine.explained(error)
        if explained is error:
            raise
        raise explained from error
    finally:
        engine.close()


def train_job(job: Job, engine: Engine, *, resume: bool, progress: bool) -> TrainResult:
    train = job.train
    folder = Path(job.run.out)
    leader = engine.rank == 0
    checkpoints = Checkpoints(
        folder / "checkpoints", keep=job.run.keep_checkpoints, rank=engine.rank, world_size=engine.world_size,
        timeout_s=job.deepspeed.timeout_s,
    )  # fmt: skip
    run = Run(job, engine)
    latest, state = resume_point(job, engine, checkpoints) if resume else (None, {})
    if latest is not None:
        engine.load(latest)
        run.restore(state)

    def prepare() -> RunLog:
        prepare_directory(folder, job.config, resume=resume, write=leader, files=engine.files())
        if leader:
            checkpoints.clean()
        return RunLog(
            folder, start_step=run.step, max_steps=train.max_steps, write=leader, progress=progress,
            tensorboard=job.run.tensorboard, unit=job.unit,
        )  # fmt: skip

    log = together(engine, f"write the run directory {folder}", prepare)
    try:
        if run.step < train.max_steps:
            resumed = [] if latest is None else [f"resumed from {latest}", *engine.notes(state)]
            for event in (*resumed, *job.notes):
                log.event(run.step, event)
        stopped = train_steps(run, log, checkpoints, Stop(folder, look=leader))
        # all ranks wait for all: launchers kill the others as soon as one ends with 75
        together(engine, "write its part of the last checkpoint", checkpoints.wait)
        model = None if stopped else export_model(run, folder)
    finally:
        log.close()
        checkpoints.finish()  # an error of the loop itself matters more than that of a write behind it
    return TrainResult(folder, run.step, model, log.rows, preempted=stopped)


def judge_images(run: Run, log: RunLog, quality: Callable, stop: Stop) -> bool:
    """Logs the metrics of generated images; whether any rank was asked to stop before they were complete."""
    figures = quality(stop.requested)
    if figures is None:
        return True
    log.row("evaluation", run.step, figures)
    return False


def owes_evaluation(run: Run, log: RunLog) -> bool:
    """Whether the run was stopped before the evaluation of its last step, or that was not asked for then."""
    job = run.job
    there = any(row["kind"] == "evaluation" and row["step"] == run.step for row in log.rows)
    owed = run.step > 0 and due(run.step, job.run.eval_every, job.train.max_steps) and job.quality is not None
    return owed and run.engine.agreed(run.engine.rank == 0 and not there)  # only rank 0 has the rows


def train_steps(run: Run, log: RunLog, checkpoints: Checkpoints, stop: Stop) -> bool:
    """Steps until max_steps or until any rank is asked to stop; returns whether it was stopped."""
    job, engine, train, watch = run.job, run.engine, run.job.train, run.job.run
    last = train.max_steps
    owed = owes_evaluation(run, log)
    if run.step >= last and not owed:
        return False
    quality = None if job.quality is None else job.quality(engine, say=lambda line: log.event(run.step, line))
    if owed:
        with stop:
            stopped = judge_images(run, log, quality, stop)
        if stopped:
            log.event(run.step, f"stopped by {stop.reason or 'another rank'}; start again to go on")
        if stopped or run.step >= last:
            return stopped
    clock = Clock()
    begin, before = time.perf_counter(), run.wall_s
    run_steps = iter(job.batches(run.step, engine))
    trace = Trace(watch, Path(watch.out) / "profile", engine)
    with stop, trace, contextlib.closing(run_steps):
        while run.step < last:
            trace.step()
            waiting = time.perf_counter()
            with trace.range("data"):
                batch = next(run_steps)
            clock.waited += time.perf_counter() - waiting
            lr = learning_rate(job.optimizer, run.step, last)
            with trace.range("step"):
                result = engine.train_step(micro_batches(batch, train.micro_batch_size), lr)
            run.step += 1
            clock.steps += 1
            run.record(batch, result)
            log.advance()
            stopping = engine.any_rank(stop.requested())
            step = run.step
            saving = stopping or due(step, watch.checkpoint_every, last)
            logging = due(step, watch.log_every, last)
            validating = job.evaluate is not None and due(step, watch.validate_every, last)
            sampling = job.samples is not None and due(step, watch.sample_every, last)
            judging = quality is not None and due(step, watch.eval_every, last) and not stopping
            if run.steps.full or saving or logging or validating or sampling or judging:
                # reading waits for the device: no training that is still queued counts as a pause
                run.read(log)
                run.wall_s = before + time.perf_counter() - begin
            if logging:
                log_row(run, log, clock, lr)
            with clock.pause():
                if validating:
                    with trace.range("validation"):
                        log.row("validation", step, job.evaluate(engine))
                if sampling:
                    picture = job.samples(engine)
                    log.images("samples", step, picture)
                if saving:
                    with trace.range("checkpoint"):
                        engine.save(checkpoints, step, run.state())
                if judging:  # after the checkpoint: it may take an hour, and is made on resume where it was cut short
                    with trace.range("evaluation"):
                        stopping = judge_images(run, log, quality, stop)
                    if stopping and not saving:
                        engine.save(checkpoints, step, run.state())
            if stopping:
                log.event(step, f"stopped by {stop.reason or 'another rank'}; saved, start again to go on")
                return True
    return False


def export_model(run: Run, folder: Path) -> Path:
    """Writes the averaged weights as a loadable model, replacing an earlier one only when complete."""
    target = folder / "model"
    state = run.engine.export()

    def write() -> None:
        if run.engine.rank == 0:
            replace_folder(target, lambda temporary: run.job.export(temporary, state, run.step))

    together(run.engine, f"write the model to {target}", write)
    return target


def check_ranks(train: TrainConfig, world_size: int) -> None:
    """Raises ValueError where several ranks were launched for the engine of one process: each would train alone."""
    require(
        train.engine == "deepspeed" or world_size == 1,
        f"train.engine 'torch' runs in one process, but {world_size} ranks were launched; set train.engine to "
        "'deepspeed'",
    )


def build_engine(job: Job, device: torch.device | str | None) -> Engine:
    """The engine that train.engine names, on `device` (None: CUDA where there is one, else the CPU)."""
    if job.train.engine == "deepspeed":
        from sfd_fast.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(job, device)
    ranks = Ranks.read()
    check_ranks(job.train, ranks.world_size)
    device = ranks.device("auto" if device is None else str(device))
    return TorchEngine(
        job.model, job.objective, optimizer=job.optimizer, train=job.train, device=device
    )
