"""Files that appear under their name complete or not at all, and what killed processes leave of them."""

import contextlib
import os
from pathlib import Path
from types import TracebackType


class AtomicFile:
    """A file being written beside `path` under a temporary name; it takes its place when the block ends well.

    with AtomicFile(path) as file:
        file.write(content)

    The bytes are synchronised to the disk before the renaming: a process that dies at any moment leaves the whole new
    file or what was there before (and perhaps a temporary file, which `sweep` removes). An exception inside the block
    removes the temporary file. reserve: bytes to be claimed on the disk at once, so that a full one is noticed early.
    Raises OSError naming the file and the reason (disk full, no permission).
    """

    def __init__(self, path: str | Path, *, reserve: int = 0):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self.size = reserve
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
        """Puts the file in its place, durably."""
        try:
            os.fsync(self._number)
            self._close()
            os.replace(self.temporary, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
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
        size = f" ({self.size} bytes)" if self.size else ""
        return OSError(error.errno, f"cannot write {self.path}{size}: {error.strerror}")

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abandon()


def write_bytes(path: str | Path, content: bytes) -> None:
    """A small file, atomically and durably. Raises OSError naming it."""
    with AtomicFile(path) as file:
        file.write(content)


def sweep(folder: str | Path) -> None:
    """Removes the temporary files that killed processes left in a folder. Only while no process writes there."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)
