"""Checkpoints that count only when complete: temporary folder, fsync, rename, and the pointer `latest` moved last.

    <out>/checkpoints/00001000/   state.json, *.safetensors; state.json lists every file with its size
    <out>/checkpoints/latest      the name of the folder to resume from

A process killed at any moment leaves either the old pointer with its folder or the new one. With several ranks each
writes its own files and a mark that they are durable; rank 0 publishes when all marks are there.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sfd_fast.files.atomic import TEMPORARY, fsync, write_atomically

POINTER = "latest"
STATE = "state.json"
DONE, FAILED = ".done-", ".failed-"


class Checkpoints:
    """The checkpoint folder of a run.

    save(step, write, state): `write(folder)` puts the files into a temporary folder; then it is made durable and
    renamed, the pointer moves, and all but the newest `keep` folders are deleted. With background=True this happens in
    a thread; the next save or `wait` raises what went wrong there. At most one save runs at a time. Every rank calls
    save. Raises OSError naming the step that did not get saved and the one that is still good.
    """

    def __init__(self, root: Path, *, keep: int, rank: int = 0, world_size: int = 1, timeout_s: float = 1800.0):
        self.root = root
        self.keep = keep
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def clean(self) -> None:
        """Removes what an interrupted save, or an interrupted deletion of an old checkpoint, left behind."""
        half_deleted = [p for p in self.root.glob("[0-9]*") if p.name.isdigit() and not (p / STATE).is_file()]
        for path in [*self.root.glob(f"{TEMPORARY}*"), *half_deleted]:
            shutil.rmtree(path, ignore_errors=True)

    def folder(self, step: int) -> Path:
        return self.root / f"{step:08d}"

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdigit() and (p / STATE).is_file())

    def pointed_step(self) -> int | None:
        pointer = self.root / POINTER
        return int(pointer.read_text()) if pointer.is_file() else None

    def latest(self) -> Path | None:
        """The folder that the pointer names, or None before the first checkpoint; ValueError where it is damaged.

        Only rank 0 looks for damage: with a file from every rank, all of them would ask the disk for ranks^2 sizes.
        """
        pointer = self.root / POINTER
        if not pointer.is_file():
            return None
        folder = self.root / pointer.read_text().strip()
        problem = damage(folder) if self.rank == 0 else None
        if problem:
            others = [f"{s:08d}" for s in self.steps() if self.folder(s) != folder and not damage(self.folder(s))]
            raise ValueError(
                f"checkpoint {folder} is damaged ({problem}); intact checkpoints: {', '.join(others) or 'none'}; "
                f"to resume from one of them, write its name into {pointer}"
            )
        return folder

    def save(self, step: int, write: Callable[[Path], None], state: dict, *, background: bool = False) -> None:
        self.wait()
        if background:
            self.thread = threading.Thread(target=self.try_write, args=(step, write, state), name="checkpoint")
            self.thread.start()
        else:
            self.write(step, write, state)

    def try_write(self, step: int, write: Callable[[Path], None], state: dict) -> None:
        try:
            self.write(step, write, state)
        except BaseException as error:
            self.failure = error

    def wait(self) -> None:
        """Waits for a save in the background and raises its error."""
        failure = self.finish()
        if failure is not None:
            raise failure

    def finish(self) -> BaseException | None:
        """Waits for a save in the background and returns its error, if there was one."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failure, self.failure = self.failure, None
        return failure

    def write(self, step: int, write: Callable[[Path], None], state: dict) -> None:
        temporary = self.root / f"{TEMPORARY}{step:08d}"
        if self.pointed_step() == step:
            return  # it is there; replacing it would leave the pointer without its folder for a moment
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            write(temporary)
            if self.world_size > 1:
                self.mark(temporary)
            if self.rank == 0:
                self.wait_for_ranks(temporary)
                self.publish(step, temporary, state)
        except (OSError, SafetensorError) as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                self.give_up(temporary)
            raise self.explained(step, error) from error

    def give_up(self, temporary: Path) -> None:
        """Tells rank 0 that this rank's part will not come, so that it need not wait for timeout_s."""
        # the disk may be full or gone: then this fails too, and must not hide the error that is being reported
        with contextlib.suppress(OSError):
            for path in temporary.glob(f"*-{self.rank:05d}.*"):
                path.unlink()  # leaves room for the mark
            (temporary / f"{FAILED}{self.rank}").touch()

    def mark(self, temporary: Path) -> None:
        """Makes this rank's files durable, then says so."""
        for path in temporary.glob(f"*-{self.rank:05d}.*"):
            fsync(path)
        (temporary / f"{DONE}{self.rank}").touch()

    def wait_for_ranks(self, temporary: Path) -> None:
        """Returns when every rank's mark is there; OSError where a rank failed or stayed silent for timeout_s."""
        deadline = time.monotonic() + self.timeout_s
        pause_s = 0.005
        while self.world_size > 1:
            failed = [p.name.removeprefix(FAILED) for p in temporary.glob(f"{FAILED}*")]
            if failed:
                raise OSError(f"rank {', '.join(failed)} could not write its part")
            marks = list(temporary.glob(f"{DONE}*"))
            if len(marks) == self.world_size:
                for mark in marks:
                    mark.unlink()
                return
            if time.monotonic() > deadline:
                missing = self.world_size - len(marks)
                raise OSError(f"{missing} of {self.world_size} ranks wrote nothing within {self.timeout_s:g} s")
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 0.5)  # a small run is not held up, a network file system not asked for ever

    def publish(self, step: int, temporary: Path, state: dict) -> None:
        """Makes a filled temporary folder durable, renames it, moves the pointer and deletes old checkpoints."""
        files = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
        (temporary / STATE).write_text(json.dumps({**state, "step": step, "files": files}, indent=1))
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        folder = self.folder(step)
        if folder.exists():
            # left by a run that was killed between the rename and the pointer's move
            shutil.rmtree(folder)
        temporary.rename(folder)
        fsync(self.root)
        write_atomically(self.root / POINTER, folder.name)
        for old in self.steps()[: -self.keep]:
            if old != step:
                shutil.rmtree(self.folder(old), ignore_errors=True)

    def explained(self, step: int, error: Exception) -> OSError:
        good = self.pointed_step()
        good = "there is none yet" if good is None else f"the checkpoint of step {good} is intact"
        return OSError(
            f"the checkpoint of step {step} could not be written to {self.root} ({error}); {good}; "
            "free some space or choose another run.out, then start again: it resumes by itself"
        )


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder: None where every file listed in its state.json has its size."""
    state = folder / STATE
    if not state.is_file():
        return f"{STATE} is missing"
    try:
        files = json.loads(state.read_text())["files"]
    except (ValueError, KeyError) as error:
        return f"{STATE} cannot be read: {error}"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def read_state(folder: Path) -> dict:
    return json.loads((folder / STATE).read_text())
