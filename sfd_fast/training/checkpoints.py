"""Checkpoints that count only when complete: temporary folder, fsync, rename, and the pointer `latest` moved last.

    <out>/checkpoints/00001000/   state-RANK.safetensors; state.json lists every file with its size and SHA-256
    <out>/checkpoints/latest      the name of the folder to resume from; "none" until there is one

A process killed at any moment leaves either the old pointer with its folder or the new one. With several ranks each
writes its own files and a mark that they are durable; rank 0 publishes when all marks are there. The pointer stands
from the beginning of a run, so that one that is missing is noticed.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sfd_fast.files.atomic import TEMPORARY, put_folder, remove_folder, sweep, write_atomically
from sfd_fast.files.digest import file_digest, settings_digest
from sfd_fast.files.documents import read_json, require_kinds

POINTER = "latest"
NONE = "none"
STATE = "state.json"
DONE, FAILED = ".done-", ".failed-"


class Checkpoints:
    """The checkpoint folder of a run.

    save(step, write, state): `write(folder)` puts the files into a temporary folder; then it is made durable and
    renamed, the pointer moves, and all but the newest `keep` folders are deleted. With background=True this happens in
    a thread; the next save or `wait` raises what went wrong there. At most one save runs at a time. Every rank calls
    save. Raises OSError naming the step that did not get saved and the one that is still good.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        rank: int = 0,
        world_size: int = 1,
        timeout_s: float = 1800.0,
        verify: bool = True,
    ):
        self.root = root
        self.keep = keep
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.verify = verify
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def begin(self) -> None:
        """Removes what an interrupted save or deletion left behind; before the first checkpoint, says there is none."""
        sweep(self.root)
        step = self.pointed_step()
        if step is not None:
            self.prune(step)
        elif not (self.root / POINTER).is_file():
            write_atomically(self.root / POINTER, NONE)

    def folder(self, step: int) -> Path:
        return self.root / f"{step:08d}"

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending; folders with other numbers for names do not count."""
        numbers = (int(path.name) for path in self.root.glob("[0-9]*") if path.name.isdecimal())
        return sorted(number for number in numbers if is_ours(self.folder(number)))

    def pointed_step(self) -> int | None:
        name = pointed(self.root)
        return None if name is None else int(name)

    def latest(self) -> Path | None:
        """The folder that the pointer names, or None before the first checkpoint.

        ValueError where it is damaged, or the pointer is missing although there are checkpoints. Every rank reads the
        bytes of its share of the files only: of as many ranks as saved it, each reads the file that it needs.
        """
        name = pointed(self.root)
        if name is None:
            if (self.root / POINTER).is_file() or not self.steps():
                return None
            raise ValueError(
                f"{self.root / POINTER} is missing, which names the checkpoint to resume from, but intact checkpoints "
                f"are there: {self.intact(all_of_them=True)}; write the name of one into it, or choose another "
                "run.out to start anew"
            )
        folder = self.root / name
        problem = damage(folder, verify=self.verify, share=(self.rank, self.world_size))
        if problem:
            raise ValueError(
                f"checkpoint {folder} is damaged ({problem}); the newest intact checkpoint is "
                f"{self.intact(apart_from=folder)}; to resume from it, write its name into {self.root / POINTER}"
            )
        return folder

    def intact(self, *, apart_from: Path | None = None, all_of_them: bool = False) -> str:
        """Name of the newest intact checkpoint, or the names of all of them; "none"."""
        found = []
        for folder in map(self.folder, reversed(self.steps())):
            if folder != apart_from and not damage(folder, verify=self.verify):
                found.append(folder.name)
                if not all_of_them:
                    break
        return ", ".join(found) or NONE

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
        from safetensors import SafetensorError  # here: engines are measured where only torch is installed

        try:
            temporary.mkdir(parents=True, exist_ok=True)
            write(temporary)
            self.mark(temporary)
            if self.rank == 0:
                self.publish(step, temporary, state, self.files_of_ranks(temporary))
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
            for path in self.own_files(temporary):
                path.unlink()  # leaves room for the mark
            (temporary / f"{FAILED}{self.rank}").touch()

    def own_files(self, temporary: Path) -> list[Path]:
        return sorted(temporary.glob(f"*-{self.rank:05d}.*"))

    def mark(self, temporary: Path) -> None:
        """Says that this rank's files are durable, and what they hold."""
        files = {p.name: [p.stat().st_size, file_digest(p)] for p in self.own_files(temporary)}
        write_atomically(temporary / f"{DONE}{self.rank}", json.dumps(files), durable=False)

    def files_of_ranks(self, temporary: Path) -> dict[str, list]:
        """{name: [size, digest]} when every rank has left its mark; OSError where one failed or stayed silent for
        timeout_s.
        """
        deadline = time.monotonic() + self.timeout_s
        pause_s = 0.005
        while True:
            failed = [p.name.removeprefix(FAILED) for p in temporary.glob(f"{FAILED}*")]
            if failed:
                raise OSError(f"rank {', '.join(failed)} could not write its part")
            marks = list(temporary.glob(f"{DONE}*"))
            if len(marks) == self.world_size:
                files = {}
                for mark in marks:
                    files |= json.loads(mark.read_text())
                    mark.unlink()
                return files
            if time.monotonic() > deadline:
                missing = self.world_size - len(marks)
                raise OSError(f"{missing} of {self.world_size} ranks wrote nothing within {self.timeout_s:g} s")
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 0.5)  # a small run is not held up, a network file system not asked for ever

    def publish(self, step: int, temporary: Path, state: dict, files: dict[str, list]) -> None:
        """Renames a filled temporary folder, moves the pointer and deletes old checkpoints."""
        folder = self.folder(step)
        if folder.exists() and not is_ours(folder):
            raise OSError(f"{folder} is there already and is no checkpoint: move it away")
        write_state(temporary, {**state, "step": step, "files": files})
        put_folder(temporary, folder)  # one that is there was left by a kill before the pointer's move
        write_atomically(self.root / POINTER, folder.name)
        self.prune(step)

    def prune(self, step: int) -> None:
        """Removes all checkpoints but the newest `keep` and that of `step`."""
        for old in self.steps()[: -self.keep]:
            if old != step:
                with contextlib.suppress(OSError):
                    remove_folder(self.folder(old))

    def explained(self, step: int, error: Exception) -> OSError:
        good = self.pointed_step()
        good = "there is none yet" if good is None else f"the checkpoint of step {good} is intact"
        return OSError(
            f"the checkpoint of step {step} could not be written to {self.root} ({error}); {good}; "
            "free some space or choose another run.out, then start again: it resumes by itself"
        )


def pointed(root: Path) -> str | None:
    """The name that the pointer holds; None where it is missing or says that there is no checkpoint yet.

    ValueError where it holds no name of a checkpoint.
    """
    pointer = root / POINTER
    if not pointer.is_file():
        return None
    with pointer.open("rb") as file:
        name = file.read(64).decode(errors="replace").strip()
    if name != NONE and not name.isdecimal():
        raise ValueError(f"{pointer} holds {name!r}; it must hold the name of a checkpoint beside it, as 00001000")
    return None if name == NONE else name


def damage(folder: Path, *, verify: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint folder; None where every file has the size and the SHA-256 in its state.json.

    verify: compare digests, not sizes alone. share: (rank, number of ranks) among which the files are divided.
    """
    if not (folder / STATE).is_file():
        return f"{STATE} is missing"
    try:
        state = read_state(folder, verify=verify)
    except ValueError as error:
        return str(error)
    names, (rank, ranks) = sorted(state["files"]), share
    for name in names[rank * len(names) // ranks : (rank + 1) * len(names) // ranks]:
        path, (size, digest) = folder / name, state["files"][name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if verify and file_digest(path) != digest:
            return f"{name} has another SHA-256 than when it was saved: a bit flipped, or it is of another checkpoint"
    return None


def is_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint that this module wrote, intact or not."""
    try:
        read_state(folder, verify=False)
    except (OSError, ValueError):
        return False
    return True


def write_state(folder: Path, state: dict) -> None:
    """state.json with a digest of its own content."""
    write_atomically(folder / STATE, json.dumps({**state, "digest": settings_digest(state)}, indent=1))


def read_state(folder: Path, *, verify: bool = True) -> dict:
    """The content of a checkpoint's state.json. ValueError where it is damaged or no checkpoint's."""
    path = folder / STATE
    state = read_json(path)
    require_kinds(state, {"step": int, "files": dict, "digest": str}, path)
    digest = state.pop("digest")
    for name, entry in state["files"].items():
        size_and_digest = isinstance(entry, list) and list(map(type, entry)) == [int, str]
        if not size_and_digest or Path(name).name != name:
            raise ValueError(f"{path}: the entry of file '{name[:60]}' is no size and SHA-256")
    if verify and settings_digest(state) != digest:
        raise ValueError(f"{path} has another SHA-256 than when it was saved: a bit flipped, or someone changed it")
    if folder.name.isdecimal() and int(folder.name) != state["step"]:
        raise ValueError(f"{path} is of step {state['step']}: it belongs to another checkpoint")
    return state
