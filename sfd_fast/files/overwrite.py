"""Files that a user names for output: written where there is nothing yet, or a file that this system wrote before."""

from collections.abc import Callable
from pathlib import Path

from sfd_fast.files.home import with_home


@with_home
def require_free(path: str | Path, is_ours: Callable[[Path], bool], *, overwrite: bool = False) -> None:
    """Raises ValueError where something is at `path` that this system did not write, before any work is done.

    is_ours(path): whether the file that is there was written by the same command; a file that it cannot read is not.
    """
    path = Path(path)
    if overwrite or not (path.exists() or path.is_symlink()):
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    try:
        ours = is_ours(path)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ValueError(
            f"{path} is there already and this command did not write it, so it is left alone: name another file, move "
            "it away, or give --overwrite true"
        )


def begins_with(mark: str) -> Callable[[Path], bool]:
    """Whether a file begins with our mark."""

    def is_ours(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(mark.encode())) == mark.encode()

    return is_ours


def never(path: Path) -> bool:
    """Of a kind of file that carries no mark."""
    return False
