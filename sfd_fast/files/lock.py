"""One command at a time in a folder: whoever comes second is told who is there.

FOLDER/.lock is locked with flock for as long as the process lives, so nothing is left behind by a killed one; it holds
one JSON that says who locked it. The ranks of one launch share the lock.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from sfd_fast.files.home import with_home

NAME = ".lock"
SETTLING_S = 0.5
"""so long a lock that another holds is asked for: its first holder may still be writing who it is"""
POLL_S = 0.05
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""flock's answers on file systems that have no locks"""

log = logging.getLogger(__name__)
held: set[int] = set()
"""descriptors of this process's locks"""


def _forget_in_child() -> None:
    """A forked child shares its parent's locks, and would keep them when the parent is killed."""
    for descriptor in held:
        os.close(descriptor)
    held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file (a file system without locks: whether it is there)."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError) and error.errno not in UNSUPPORTED:
            raise
        return True
    finally:
        os.close(descriptor)
    return False


def read_record(path: Path) -> dict:
    """What a lock file says of its holder; empty where that is being written, or cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


class FolderLock:
    """Holds a folder, which is made where it is missing, while the block runs.

    with FolderLock(out, command="sfd sample", advice="choose another folder with --out"):
        ...

    launch: a name that the processes of one launch have in common, and share the lock by (ranks.launch_name); None:
    this process alone.
    clean: called by the first process there while no other is: it may sweep leftovers of killed ones. advice: ends the
    error's line. Works on NFS where its server has locks; on a file system without any, one line says so, nothing is
    cleaned and all may enter. name: of the file, where a folder has several locks.
    Raises BlockingIOError (an OSError) naming process, host and time of who holds the folder; OSError where the folder
    cannot be written.
    """

    @with_home
    def __init__(
        self,
        folder: str | Path,
        *,
        command: str,
        advice: str,
        launch: str | None = None,
        clean: Callable[[], object] | None = None,
        name: str = NAME,
    ) -> None:
        self.path = Path(folder, name)
        self.command, self.launch, self.advice, self.clean = command, launch, advice, clean
        self._descriptor = -1

    def __enter__(self) -> "FolderLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            held.add(self._descriptor)
            self._take()
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in UNSUPPORTED:
                log.warning("%s: this file system has no locks; start one command at a time there", self.path.parent)
                return self
            self.__exit__()
            if not isinstance(error, OSError) or isinstance(error, BlockingIOError):
                raise
            raise OSError(f"{self.path.parent} cannot be written ({error}): {self.advice}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor in held:  # not in a forked child
            held.discard(descriptor)
            os.close(descriptor)

    def _take(self) -> None:
        until = time.monotonic() + SETTLING_S
        while True:
            if self._locked(fcntl.LOCK_EX):
                self._write()
                if self.clean is not None:
                    self.clean()
                if self.launch is None:
                    return
            # where the lock was exclusive just now, another may get in between and write its own name
            if self.launch is not None and self._locked(fcntl.LOCK_SH):
                if read_record(self.path).get("launch") == self.launch:
                    return
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
                raise self._busy()
            ours = (
                self.launch is not None and read_record(self.path).get("launch") == self.launch
            )  # its first process cleans
            if not ours and time.monotonic() > until:
                raise self._busy()
            time.sleep(POLL_S)

    def _locked(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _write(self) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        record = {"command": self.command, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, (json.dumps(record | {"launch": self.launch}) + "\n").encode(), 0)

    def leave_reason(self, reason: str) -> None:
        """Adds to the file why its holder ends before its time, for those who ask."""
        with contextlib.suppress(OSError):  # a full disk may be the reason
            self.path.write_text(json.dumps(read_record(self.path) | {"reason": reason}) + "\n")

    def _busy(self) -> BlockingIOError:
        holder = read_record(self.path)
        who = "another process"
        if holder:
            who = "`{command}` (process {pid} on {host}, since {since})".format_map(
                {"command": "?", "pid": "?", "host": "?", "since": "?"} | holder
            )
        return BlockingIOError(f"{self.path.parent} is in use by {who}: wait for it, stop it, or {self.advice}")
