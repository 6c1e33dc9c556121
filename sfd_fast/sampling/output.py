"""The images of `sfd sample` on disk, whichever process made them: written, counted, waited for, gathered.

A unit is one micro-batch, named by its first image. Units appear whole: one .npy each for the npz, else picture files.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sfd_fast.diffusion import random_numbers
from sfd_fast.files.atomic import sweep
from sfd_fast.files.lock import FolderLock, is_held, read_record
from sfd_fast.files.messages import first_line
from sfd_fast.ranks import launch_name
from sfd_fast.sampling.image_writer import AsyncWriter, is_whole, write_array, write_image, write_npz

NPZ, GRID, STAGES = "samples.npz", "grid.png", "stages.png"
PULSE = ".alive-"
POLL_S, PULSE_S = 0.2, 1.0
LOOK_SHARE = 10
"""counting files may take a tenth of the time: a network's folder answers slowly"""
HANGS = 10
"""a process that lives but writes nothing for so many times stall_s is given up too"""


@dataclass(frozen=True)
class SampleFiles:
    """Where the units of one run are."""

    out: Path
    format: str
    num: int
    """images of all processes"""
    size: int
    """images of a unit, but for the last"""

    @property
    def starts(self) -> range:
        return range(0, self.num, self.size)

    @property
    def gathered(self) -> bool:
        """Whether the npz is there, which replaces the parts."""
        return self.format == "npz" and is_whole(self.npz)

    @property
    def folder(self) -> Path:
        """Of the single pictures, or of the parts of the npz."""
        return self.out / ("parts" if self.format == "npz" else "images")

    @property
    def npz(self) -> Path:
        return self.out / NPZ

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names that this run puts into its folder."""
        own = NPZ if self.format == "npz" else "labels.npy"
        return own, self.folder.name, GRID, STAGES

    def image(self, number: int) -> Path:
        return self.folder / f"{number:06d}.{self.format}"

    def part(self, first: int) -> Path:
        return self.folder / f"{first:08d}.npy"

    def numbers(self, first: int) -> range:
        return range(first, min(first + self.size, self.num))

    def finished(self, first: int) -> bool:
        if self.format == "npz":
            return is_whole(self.part(first)) or self.gathered  # in this order: parts go when the npz is there
        return all(is_whole(self.image(number)) for number in self.numbers(first))

    def write(self, writer: AsyncWriter, first: int, images: np.ndarray) -> None:
        if self.format == "npz":
            writer.submit(lambda: write_array(self.part(first), images))
            return
        for number, image in enumerate(images, first):
            writer.submit(lambda number=number, image=image: write_image(self.image(number), image))

    def first_images(self, count: int) -> list[np.ndarray]:
        """Images 0 .. count - 1, (H, W, 3) each, before the npz is gathered."""
        if self.format == "npz":
            parts = [np.load(self.part(first)) for first in self.starts[: -(-count // self.size)]]
            return list(np.concatenate(parts)[:count])
        return [np.asarray(Image.open(self.image(number)).convert("RGB")) for number in range(count)]

    def gather(self, labels: torch.Tensor, shuffle_seed: int) -> Path | None:
        """Out of the parts the evaluator's npz, shuffled; beside pictures their labels as labels.npy.

        Raises OSError where the disk is full: the parts stay, and the npz needs as much room once more.
        """
        if self.format != "npz":
            write_array(self.out / "labels.npy", labels.numpy())
            return None
        if not self.gathered:
            order = random_numbers.permutation(self.num, seed=shuffle_seed, stream=random_numbers.OUTPUT_ORDER).numpy()
            others = {"arr_1": labels.numpy()[order], "sample_ids": order}
            parts = [self.part(first) for first in self.starts]
            try:
                write_npz(self.npz, parts, order, self.size, others)
            except OSError as error:
                needed = sum(part.stat().st_size for part in parts)
                raise OSError(
                    f"{error}; it needs {needed / 2**30:.2f} GiB beside its parts, which are complete: make room, or "
                    f"move {self.out} to a larger disk, and run the same command again (with its --out)"
                ) from error
        for first in self.starts:
            self.part(first).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rmdir()
        return self.npz


class Progress:
    """How many images of all processes are on disk, as a bar with images/s."""

    def __init__(self, files: SampleFiles, *, shown: bool) -> None:
        from tqdm import tqdm

        self.files = files
        self.left = list(files.starts)
        self.next_look = 0.0
        self.look()
        self.units_before, self.before = len(files.starts) - len(self.left), self.done
        self.bar = tqdm(total=files.num, initial=self.done, unit="image", smoothing=0.1, disable=not shown)

    @property
    def done(self) -> int:
        return self.files.num - sum(len(self.files.numbers(first)) for first in self.left)

    def look(self) -> None:
        start = time.monotonic()
        self.left = [first for first in self.left if not self.files.finished(first)]
        now = time.monotonic()
        self.next_look = now + max(1.0, LOOK_SHARE * (now - start))

    def update(self, *, now: bool = False) -> None:
        """Moves the bar; looks at the disk once in a while, or `now`."""
        if now or time.monotonic() >= self.next_look:
            self.look()
            self.bar.update(self.done - self.bar.n)


@contextlib.contextmanager
def occupied(out: Path, rank: int, stall_s: float) -> Iterator[None]:
    """While inside, the folder belongs to this launch, and this rank shows there that it lives.

    out/.alive-RANK is locked and touched by a thread, so that others can tell a slow process from a dead one: a killed
    process's lock is gone at once, also from other machines where their file system has locks; elsewhere its file
    stays as it was. One that ends with an error leaves its reason there.
    Raises OSError where another command works in the folder, or it cannot be written.
    """
    advice = "choose another folder with --out"
    path = out / f"{PULSE}{rank}"
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(min(10.0, stall_s / 4)):
            with contextlib.suppress(OSError):  # a full disk is noticed by those who write images
                os.utime(path)

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    with (
        FolderLock(out, command="sfd sample", launch=launch_name(), advice=advice, clean=lambda: sweep_all(out)),
        FolderLock(out, command=f"rank {rank} of sfd sample", advice=advice, name=path.name) as own,
    ):
        thread.start()
        try:
            yield
            path.unlink(missing_ok=True)
        except BaseException as error:
            if launch_name() is None:
                path.unlink(missing_ok=True)
            else:
                own.leave_reason(first_line(error))
            raise
        finally:
            stopped.set()
            thread.join()


def sweep_all(out: Path) -> None:
    """Removes what killed processes left; only while none is there."""
    for folder in (out, out / "images", out / "parts"):
        sweep(folder)
    for path in out.glob(f"{PULSE}*"):
        path.unlink(missing_ok=True)


def stopped_ranks(out: Path, *, but: int) -> list[str]:
    """One line for every other rank that began here and has stopped before its end."""
    lines = []
    for path in sorted(out.glob(f"{PULSE}*")):
        rank = path.name.removeprefix(PULSE)
        record = read_record(path)
        if rank != str(but) and record and not is_held(path) and path.exists():
            reason = f": {record['reason']}" if "reason" in record else ""
            lines.append(f"rank {rank} (process {record.get('pid')} on {record.get('host')}) has stopped{reason}")
    return lines


def pulses(out: Path) -> dict[str, int]:
    """When each process but rank 0 touched its file: compared with itself only, as clocks of machines differ."""
    found = {}
    for path in out.glob(f"{PULSE}*"):
        with contextlib.suppress(FileNotFoundError):
            if path.name != f"{PULSE}0":
                found[path.name] = path.stat().st_mtime_ns
    return found


def wait_for_all(files: SampleFiles, progress: Progress, stall_s: float) -> None:
    """Returns when every process's images are on disk.

    Raises OSError where a process has stopped, or nothing new appears: for stall_s seconds without any process's pulse,
    or HANGS times as long.
    """
    seen, last_file, last_pulse, next_look = pulses(files.out), time.monotonic(), time.monotonic(), 0.0
    while progress.left:
        time.sleep(POLL_S)
        before = len(progress.left)
        progress.update(now=True)
        current, now = pulses(files.out), time.monotonic()
        if len(progress.left) < before:
            last_file = last_pulse = now
        if current != seen:
            seen, last_pulse = current, now
        silent, hangs = now - last_pulse > stall_s, now - last_file > HANGS * stall_s
        reason = ""
        if silent or hangs:
            waited, state = (now - last_pulse, "has stopped") if silent else (now - last_file, "lives but hangs")
            reason = f"nothing was written for {waited:.0f} s (--stall_s {stall_s:g}): another process {state}"
        elif now > next_look:
            next_look = now + PULSE_S
            reason = "; ".join(stopped_ranks(files.out, but=0))
        if reason and progress.left:
            raise OSError(
                f"{len(progress.left)} of {len(files.starts)} micro-batches are missing in {files.out} and {reason}; "
                "run the same command again to go on"
            )
