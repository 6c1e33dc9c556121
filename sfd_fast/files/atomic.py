"""Files and folders that appear under their name complete or not at all, and what killed processes leave of them.

There is one naming scheme: what is being written is called .writing-PID-THREAD-NAME beside its target, and `sweep`
removes what killed processes left of it.
"""

import contextlib
import ctypes
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from sfd_fast.files.home import with_home
from sfd_fast.files.messages import first_line

TEMPORARY = ".writing-"
OLD = ".old-"
"""what a folder is called for a moment while another takes its place, where the file system cannot exchange two"""
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # linux/fs.h, fcntl.h


def temporary_path(path: Path) -> Path:
    """The name under which this thread writes `path`."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{threading.get_ident()}-{path.name}")


class AtomicFile:
    """A file being written beside `path` under a temporary name; it takes its place when the block ends well.

    with AtomicFile(path) as file:
        file.write(content)

    durable: the bytes are synchronised to the disk before the renaming, so that a power cut too leaves the whole new
    file or what was there before. An exception inside the block removes the temporary file. reserve: bytes to be
    claimed on the disk at once, so that a full one is noticed early. The file gets the permissions of the umask.
    Raises OSError naming the file and the reason (disk full, no permission).
    """

    @with_home
    def __init__(self, path: str | Path, *, reserve: int = 0, durable: bool = True):
        self.path = Path(path)
        self.temporary = temporary_path(self.path)
        self.size, self.durable = reserve, durable
        self._number = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # no buffer: what could not be written would be tried once more on closing
            self._number = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            if reserve:
                os.posix_fallocate(self._number, 0, reserve)
        except OSError as error:
            self.abandon()
            raise self._named(error) from error

    def write(self, content: bytes | memoryview, offset: int = 0) -> None:
        """Stores bytes (a memoryview: of uint8) at an offset."""
        view = memoryview(content)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._number, view[done : done + 2**30], offset + done)
        except OSError as error:
            raise self._named(error) from error

    def commit(self) -> None:
        """Puts the file in its place."""
        try:
            if self.durable:
                os.fsync(self._number)
            self._close()
            os.replace(self.temporary, self.path)
            if self.durable:
                fsync(self.path.parent)
        except OSError as error:
            raise self._named(error) from error
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Removes the temporary file, if it is there still. Never raises: the first error is the one to report."""
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def _named(self, error: OSError) -> OSError:
        return not_written(self.path, error, f" ({self.size} bytes)" if self.size else "")

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abandon()


def not_written(path: Path, error: Exception, size: str = "") -> OSError:
    """The error of a file that could not be written; it says what is there now."""
    there = "the previous file is intact" if path.exists() else "nothing was left behind"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    text = f"cannot write {path}{size}: {reason}; {there}"
    return OSError(error.errno, text) if isinstance(error, OSError) and error.errno else OSError(text)


def write_atomically(
    path: str | Path, content: bytes | memoryview | str | Callable[[Path], None], *, durable: bool = True
) -> None:
    """A whole file at once: its bytes, its text, or a function that writes a file of the name that it is given
    (with the suffix of path).

    Raises OSError naming the file; what was there before is then intact. ValueError and TypeError of the function pass.
    """
    if isinstance(content, str):
        content = content.encode()
    file = AtomicFile(path, durable=durable)
    if isinstance(content, bytes | memoryview):
        with file:
            file.write(content)
        return
    with file:
        mode = os.fstat(file._number).st_mode & 0o777
        try:
            content(file.temporary)
            os.chmod(file.temporary, mode)  # safetensors gives its files to their owner alone
            if durable:
                fsync(file.temporary)
        except (ValueError, TypeError):
            raise
        except Exception as error:  # libraries wrap the system's error in kinds of their own
            raise not_written(file.path, error) from error


def create_once(path: Path, content: bytes) -> bool:
    """Creates a file that nobody has created yet; False where it exists already.

    Whole at once by a hard link; where the file system has none, whoever reads it may see the beginning only.
    """
    temporary = temporary_path(path)
    temporary.write_bytes(content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # exFAT, some network and container file systems: EPERM, ENOTSUP, ENOSYS
        try:
            with open(path, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink()
    return True


@with_home
def replace_folder(target: str | Path, write: Callable[[Path], None]) -> None:
    """write(folder) fills a folder that then takes the place of `target` in one step, durably.

    A process killed at any moment leaves the old folder or the new one under that name. A target that is a symbolic
    link stays one: what it points to is replaced.
    """
    target = Path(os.path.realpath(target))
    temporary, old = temporary_path(target), target.with_name(f"{OLD}{target.name}")
    if old.is_dir() and not target.exists():
        old.rename(target)  # a process was killed between the two renames in put_folder
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for path in temporary.rglob("*"):
            fsync(path)
        put_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_folder(temporary: Path, target: Path) -> None:
    """A folder whose files are durable takes the place of `target`, in one step where the system can; what was there
    is removed.
    """
    fsync(temporary)
    old = target.with_name(f"{OLD}{target.name}")
    if not target.exists():
        temporary.rename(target)
    elif exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    fsync(target.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder; killed in the middle, it leaves what sweep() removes, never a part under the folder's name."""
    hidden = temporary_path(path)
    path.rename(hidden)
    if hidden.is_symlink():
        hidden.unlink()
    shutil.rmtree(hidden, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two files or folders in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    if not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


@with_home
def sweep(folder: str | Path) -> None:
    """Removes what killed processes left of files and folders in `folder`. Only while no process writes there."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Forces a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
