"""The training loop: one function for every engine and every network.

    <out>/config.json  metrics.jsonl  tensorboard/  checkpoints/  model/   (model: averaged weights, ready to sample)
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sfd_fast.config import TrainConfig, require
from sfd_fast.config.run import PREEMPTED
from sfd_fast.ranks import Ranks
from sfd_fast.training.checkpoints import STATE, Checkpoints
from sfd_fast.training.deterministic import deterministic_algorithms
from sfd_fast.training.engines.interface import Batch, Engine, batch_size, together
from sfd_fast.training.engines.torch import TorchEngine
from sfd_fast.training.job import Job
from sfd_fast.training.optimizer import learning_rate
from sfd_fast.training.run.directory import (
    MODEL,
    check_alike,
    lock,
    prepare_directory,
    resume_notes,
    resume_point,
)
from sfd_fast.training.run.log import METRICS, RunLog, read_rows, rows_backwards
from sfd_fast.training.run.progress import Clock, Run, log_row
from sfd_fast.training.run.stop import Stop
from sfd_fast.training.run.trace import Trace


@dataclass
class TrainResult:
    """How a run ended."""

    directory: Path
    step: int
    model: Path | None
    """folder of the averaged weights, None where the run was stopped before its end"""
    preempted: bool = False

    @property
    def metrics(self) -> list[dict]:
        """All rows of metrics.jsonl, read when asked for: a long run has more than one would hold."""
        return read_rows(self.directory / METRICS)

    @property
    def loss(self) -> float:
        """The last logged training loss; NaN where there is none."""
        rows = (row for row, _ in rows_backwards(self.directory / METRICS) if row["kind"] == "train")
        return next(rows, {}).get("loss") or math.nan

    @property
    def exit_code(self) -> int:
        return PREEMPTED if self.preempted else 0


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """The batch in pieces of `size` samples (0: in one piece); the last may be smaller."""
    total = batch_size(batch)
    if size == 0 or size >= total:
        return [batch]
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, total, size)]


def run_job(job: Job, engine: Engine, *, resume: bool = True, progress: bool = True) -> TrainResult:
    """Trains job.model from the latest checkpoint, or from the start, to train.max_steps; closes the engine.

    Raises ValueError for a checkpoint of another configuration or other data, NonFiniteError after max_bad_steps bad
    steps in a row, OSError where the run directory or a checkpoint cannot be written; earlier checkpoints stay intact.
    """
    folder = Path(job.run.out)
    try:
        with contextlib.ExitStack() as held:
            first = lock(folder) if engine.rank == 0 else contextlib.nullcontext()
            together(engine, f"take {folder}", lambda: held.enter_context(first))
            if job.train.deterministic:
                held.enter_context(deterministic_algorithms())
            return train_job(job, engine, resume=resume, progress=progress)
    except RuntimeError as error:
        explained = engine.explained(error)
        if explained is error:
            raise
        raise explained from error
    finally:
        engine.close()


def train_job(job: Job, engine: Engine, *, resume: bool, progress: bool) -> TrainResult:
    folder, leader = Path(job.run.out), engine.rank == 0
    checkpoints = Checkpoints(
        folder / "checkpoints", keep=job.run.keep_checkpoints, rank=engine.rank, world_size=engine.world_size,
        timeout_s=job.deepspeed.timeout_s, verify=job.run.verify,
    )  # fmt: skip
    run = Run(job, engine)
    check_alike(job, engine)
    latest, state = resume_point(job, engine, checkpoints) if resume else (None, {})
    if latest is not None:
        engine.load(latest)
        run.restore(state, latest / STATE)

    def prepare() -> RunLog:
        prepare_directory(folder, job.config, resume=resume, write=leader, step=run.step, files=engine.files())
        if leader:
            checkpoints.begin()
        return RunLog(
            folder, start_step=run.step, max_steps=job.train.max_steps, write=leader, progress=progress,
            tensorboard=job.run.tensorboard, unit=job.unit,
        )  # fmt: skip

    log = together(engine, f"write the run directory {folder}", prepare)
    try:
        if run.step < job.train.max_steps:
            resumed = [] if latest is None else resume_notes(engine, latest, state)
            for event in (*resumed, *job.notes):
                log.event(run.step, event)
        stopped = Loop(run, log, checkpoints, Stop(folder, look=leader)).steps()
        # all ranks wait for all: launchers kill the others as soon as one ends with 75
        together(engine, "write its part of the last checkpoint", checkpoints.wait)
        model = None if stopped else export_model(run, folder / MODEL)
    finally:
        log.close()
        checkpoints.finish()  # an error of the loop itself matters more than that of a write behind it
    return TrainResult(folder, run.step, model, preempted=stopped)


class Loop:
    """The steps of a run, and what comes after some of them: rows, held-out loss, pictures, checkpoints, judgement."""

    def __init__(self, run: Run, log: RunLog, checkpoints: Checkpoints, stop: Stop):
        self.run, self.log, self.checkpoints, self.stop = run, log, checkpoints, stop
        self.job, self.engine, self.train = run.job, run.engine, run.job.train
        self.clock = Clock(run.wall_s)
        self.trace = Trace(self.job.run, Path(self.job.run.out) / "profile", self.engine)
        self.quality: Callable | None = None

    def steps(self) -> bool:
        """Steps until max_steps or until any rank is asked to stop; returns whether it was stopped."""
        run, last = self.run, self.train.max_steps
        owed = self.owes_evaluation()
        if run.step >= last and not owed:
            return False
        if self.job.quality is not None:
            self.quality = self.job.quality(self.engine, say=lambda line: self.log.event(run.step, line))
        with self.stop:
            if owed and self.judge():
                self.log.event(run.step, f"stopped by {self.stop.reason or 'another rank'}; start again to go on")
                return True
            if run.step >= last:
                return False
            batches = iter(self.job.batches(run.step, self.engine))
            with self.trace, contextlib.closing(batches):
                while run.step < last:
                    lr = self.step(batches)
                    if self.attend(lr, self.engine.any_rank(self.stop.requested())):
                        by = self.stop.reason or "another rank"
                        self.log.event(run.step, f"stopped by {by}; saved, start again to go on")
                        return True
        return False

    def step(self, batches: Iterator[Batch]) -> float:
        """One update; returns its learning rate."""
        run = self.run
        self.trace.step()
        with self.clock.wait(), self.trace.range("data"):
            batch = next(batches)
        lr = learning_rate(self.job.optimizer, run.step, self.train.max_steps)
        with self.trace.range("step"):
            result = self.engine.train_step(micro_batches(batch, self.train.micro_batch_size), lr)
        run.step += 1
        self.clock.steps += 1
        run.record(batch, result)
        self.log.advance()
        return lr

    def attend(self, lr: float, stopping: bool) -> bool:
        """Whatever is due after a step; returns whether the run is to stop, which it is only once it has saved."""
        run, watch, step = self.run, self.job.run, self.run.step
        saving = stopping or self.due(watch.checkpoint_every)
        logging = self.due(watch.log_every)
        validating = self.job.evaluate is not None and self.due(watch.validate_every)
        sampling = self.job.samples is not None and self.due(watch.sample_every)
        judging = self.quality is not None and self.due(watch.eval_every) and not stopping
        if run.steps.full or saving or logging or validating or sampling or judging:
            # reading waits for the device: no training that is still queued counts as a pause
            run.read(self.log)
            run.wall_s = self.clock.wall_s
        if logging:
            log_row(run, self.log, self.clock, lr)
        with self.clock.pause():
            if validating:
                with self.trace.range("validation"):
                    self.log.row("validation", step, self.job.evaluate(self.engine))
            if sampling:
                self.log.images("samples", step, self.job.samples(self.engine))
            if saving:
                with self.trace.range("checkpoint"):
                    self.engine.save(self.checkpoints, step, run.state())
            if judging:  # after the checkpoint: it may take an hour, and is made on resume where it was cut short
                with self.trace.range("evaluation"):
                    stopping = self.judge()
                if stopping and not saving:
                    self.engine.save(self.checkpoints, step, run.state())
        return stopping

    def due(self, every: int) -> bool:
        step = self.run.step
        return every > 0 and (step % every == 0 or step == self.train.max_steps)

    def judge(self) -> bool:
        """Logs the metrics of generated images; whether any rank was asked to stop before they were complete."""
        figures = self.quality(self.stop.requested)
        if figures is None:
            return True
        self.log.row("evaluation", self.run.step, figures)
        return False

    def owes_evaluation(self) -> bool:
        """Whether the run was stopped before the evaluation of its last step, or that was not asked for then."""
        step = self.run.step
        owed = step > 0 and self.due(self.job.run.eval_every) and self.job.quality is not None
        return owed and self.engine.agreed(self.engine.rank == 0 and not self.log.has("evaluation", step))


def export_model(run: Run, target: Path) -> Path:
    """Writes the averaged weights as a loadable model, replacing an earlier one only when complete."""
    state = run.engine.export()

    def write() -> None:
        if run.engine.rank == 0:
            run.job.export(target, state, run.step)

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
