"""What a run reports: metrics.jsonl, TensorBoard, a progress bar, and the statistics of the steps between two rows."""

import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from sfd_fast.pictures import save

METRICS = "metrics.jsonl"
BLOCK, LONGEST_ROW = 2**16, 2**20
"""bytes of a metrics file that are read at once, and that one row may have"""
RECENT_NORMS = 100
"""gradient norms whose median is the measure of a spike"""
SPIKE_NEEDS = 20
"""norms that must have been seen before a spike is called one"""


class StepLog:
    """Values of every step, kept on the device and read by the host once per `capacity` steps.

    add(values, bad) writes one row; read() moves the rows into host sums. Rows of skipped steps (bad = 1) do not enter
    the means. Its state is plain numbers, so a resumed run reports what an unbroken one does.
    """

    def __init__(self, names: list[str], capacity: int, device: torch.device, *, num_bins: int = 0):
        self.names = names
        self.rows = torch.zeros(capacity, len(names) + 1, device=device)
        self.filled = 0
        self.sums = [0.0] * len(names)
        self.count = 0
        self.num_bins = num_bins
        self.bins = torch.zeros(2, num_bins, device=device) if num_bins else None

    def add(self, values: list[Tensor], bad: Tensor) -> None:
        torch.stack([*values, bad], out=self.rows[self.filled])
        self.filled += 1

    def add_bins(self, bins: Tensor, values: Tensor, bad: Tensor) -> None:
        """Adds per-sample values (B,) to their bins (B,) int64, unless the step is bad."""
        good = (bad == 0).to(values.dtype)
        self.bins[0].index_add_(0, bins, torch.where(bad == 0, values, torch.zeros_like(values)))
        self.bins[1].index_add_(0, bins, good.expand_as(values))

    @property
    def full(self) -> bool:
        return self.filled == len(self.rows)

    def read(self, reduce: Callable[[Tensor], Tensor]) -> list[list[float]]:
        """The rows since the last read, [values..., bad] each, after `reduce` over ranks: the log's one host read."""
        rows = reduce(self.rows[: self.filled]).tolist()
        self.filled = 0
        for row in rows:
            if not row[-1]:
                self.count += 1
                self.sums = [s + v for s, v in zip(self.sums, row)]
        return rows

    def means(self) -> dict[str, float]:
        """Means over the good steps since the last call (NaN where there was none), then starts anew."""
        means = {n: s / self.count if self.count else math.nan for n, s in zip(self.names, self.sums)}
        self.sums, self.count = [0.0] * len(self.names), 0
        return means

    def bin_means(self, reduce: Callable[[Tensor], Tensor]) -> list[float | None]:
        """Means per bin of the samples of all ranks; None for an empty bin. Starts anew."""
        total, count = reduce(self.bins).tolist()
        self.bins.zero_()
        return [t / c if c else None for t, c in zip(total, count)]

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict:
        """What a checkpoint stores: sums over all ranks, since rank 0 alone writes them. Every rank calls it."""
        bins = [] if self.bins is None else reduce(self.bins).tolist()
        return {"sums": self.sums, "count": self.count, "bins": bins}

    def restore(self, state: dict, *, leader: bool) -> None:
        """Only the leader takes the bins: they are summed over ranks again when a row is made."""
        if len(state["sums"]) == len(self.names):
            self.sums, self.count = [float(value) for value in state["sums"]], int(state["count"])
        if leader and self.bins is not None and state["bins"]:
            self.bins.copy_(torch.tensor(state["bins"]))


class GradNormWatch:
    """Calls a gradient norm a spike where it exceeds `factor` times the median of the last norms."""

    def __init__(self, factor: float):
        self.factor = factor
        self.recent: list[float] = []

    def spike(self, norm: float) -> float | None:
        """The median that the norm exceeds, or None; then remembers the norm."""
        median = statistics.median(self.recent) if len(self.recent) >= SPIKE_NEEDS else math.inf
        self.recent = [*self.recent, norm][-RECENT_NORMS:]
        return median if norm > self.factor * median else None


class RunLog:
    """Rows of a run: appended to metrics.jsonl, drawn in TensorBoard, said on the terminal. Only rank 0 writes.

    Rows are dictionaries with "kind" (train, validation, evaluation, event) and "step", in the order of the steps. On
    resume, rows after the checkpoint's step are cut off, so that every step stands there once. ValueError where the
    file holds something else.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start_step: int,
        max_steps: int,
        write: bool,
        progress: bool,
        tensorboard: bool,
        unit: str,
    ):
        self.folder = folder
        self.path = folder / METRICS
        self.write = write
        self.bar = self.board = self.file = None
        if not write:
            return
        if self.path.is_file():
            kept = (end for row, end in rows_backwards(self.path) if row["step"] <= start_step)
            os.truncate(self.path, next(kept, 0))
        self.file = open(self.path, "a")  # noqa: SIM115 (open for the whole run)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        if progress:
            self.bar = tqdm(total=max_steps, initial=start_step, unit=unit, file=sys.stderr, dynamic_ncols=True)

    def row(self, kind: str, step: int, values: Mapping) -> None:
        """One row; numbers, and those of a list one by one, also go to TensorBoard under kind/name.

        NaN and infinity are stored as null.
        """
        if not self.write:
            return
        row = {"kind": kind, "step": step} | {name: storable(value) for name, value in values.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in scalars(row).items():
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def has(self, kind: str, step: int) -> bool:
        """Whether there is a row of a kind at the newest step, or at one after it."""
        newest = itertools.takewhile(lambda found: found[0]["step"] >= step, rows_backwards(self.path))
        return any(row["kind"] == kind and row["step"] == step for row, _ in newest)

    def event(self, step: int, message: str) -> None:
        """Something worth a line: said on the terminal and kept as a row."""
        if not self.write:
            return
        self.row("event", step, {"message": message})
        say = self.bar.write if self.bar is not None else print
        say(f"step {step}: {message}", file=sys.stderr)

    def images(self, name: str, step: int, grid: Tensor) -> None:
        """A picture (3, H, W) uint8: samples/<step>.png, and TensorBoard."""
        if not self.write:
            return
        save(self.folder / name / f"{step:08d}.png", grid.permute(1, 2, 0).numpy())
        if self.board is not None:
            self.board.add_image(name, grid, step)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def show(self, **values: str) -> None:
        """Figures behind the progress bar, which itself shows the time left."""
        if self.bar is not None:
            self.bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        for resource in (self.bar, self.board, self.file):
            if resource is not None:
                resource.close()


def read_rows(path: Path) -> list[dict]:
    """Rows of a metrics file, none where it is missing; a last line cut short by a kill is left out."""
    return [row for row, _ in rows_backwards(path)][::-1]


def rows_backwards(path: Path) -> Iterator[tuple[dict, int]]:
    """Rows of a metrics file from the last one back, each with the position of its end, in little memory.

    A last line cut short by a kill is left out. ValueError where a line is no row of a run.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line, end in lines_backwards(file):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
                raise ValueError(
                    f"{path}: the line that ends at byte {end} is no row of a run: {line[:40]!r}; remove that line, or "
                    "move the file away to go on without its rows"
                )
            yield row, end


def lines_backwards(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(line, position after its end) of the ended lines of a file from the last one back."""
    position = end = file.seek(0, os.SEEK_END)
    rest, ended = b"", False
    while position > 0:
        size = min(BLOCK, position)
        position -= size
        file.seek(position)
        rest, *lines = (file.read(size) + rest).split(b"\n")
        for line in reversed(lines):
            if ended:
                yield line, end + 1
            ended = True
            end -= len(line) + 1
        if not ended:
            rest, end = b"", position
        elif len(rest) > LONGEST_ROW:
            raise ValueError(f"{file.name}: the line that ends at byte {end + 1} is longer than {LONGEST_ROW} bytes")
    if ended:
        yield rest, end + 1


def scalars(row: Mapping) -> dict[str, float]:
    """The numbers of a row by name, apart from the step; number i of a list is name/i."""
    lists = {name: value for name, value in row.items() if isinstance(value, list)}
    parts = {f"{name}/{i}": value for name, values in lists.items() for i, value in enumerate(values)}
    return {n: v for n, v in {**row, **parts}.items() if isinstance(v, int | float) and n != "step"}


def memory_gib(device: torch.device) -> float:
    """Memory of this process in GiB: on CUDA the most that torch held since the last call, else what resides now.

    NaN on a system without /proc.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return math.nan
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def storable(value: object) -> object:
    """JSON has no NaN or infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
