"""Folders of models and pipelines: replaced in one step, never in place of a stranger's, every file with its digest.

    FOLDER/sfd_fast.json   our mark: what the folder is, what we put there, and the size and SHA-256 of every file (but
                           for pipeline.json, which has a digest inside)

A folder inside that has a mark of its own (a pipeline's parts) is checked by that one.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sfd_fast.files.atomic import not_written, replace_folder
from sfd_fast.files.digest import file_digest, settings_digest
from sfd_fast.files.documents import read_json, require_kinds
from sfd_fast.files.home import with_home
from sfd_fast.files.tensors import read_description

MARK = "sfd_fast.json"
WEIGHTS = "model.safetensors"
PIPELINE = "pipeline.json"
UNMARKED = {
    WEIGHTS, PIPELINE, "config.json", "released.safetensors", "transformer", "guide", "texture_codec", "statistics",
}  # fmt: skip
"""what we put into a folder, where the mark that lists it is gone"""

log = logging.getLogger(__name__)


@with_home
def replace_marked(folder: str | Path, kind: str, write: Callable[[Path], None]) -> None:
    """write(temporary) fills a folder that takes the place of `folder` in one step, with our mark.

    A process killed at any moment leaves the old folder or the new one. Files that others put into an old folder of
    ours are kept. Raises ValueError where `folder` holds something that is not ours, OSError where the place cannot be
    written; what was there is then intact.
    """
    folder = Path(folder)
    kept = strangers(folder)

    def fill(temporary: Path) -> None:
        write(temporary)
        mode = temporary.stat().st_mode & 0o666  # safetensors gives its files to their owner alone
        for path in files_of(temporary):
            path.chmod(mode)
        (temporary / MARK).write_text(mark_of(temporary, kind))
        for name in kept:
            if not (temporary / name).exists():
                keep(folder / name, temporary / name)

    try:
        replace_folder(folder, fill)
    except (OSError, SafetensorError) as error:
        raise not_written(folder, error) from error


def strangers(folder: Path) -> list[str]:
    """Names in a folder of ours that we did not put there. ValueError where the folder is not ours, but not empty."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder to write the model into")
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    if not names:
        return []
    if MARK in names:
        ours = {*read_mark(folder)["entries"], MARK}
    elif PIPELINE in names or (WEIGHTS in names and described(folder / WEIGHTS)):
        ours = UNMARKED
    else:
        raise ValueError(
            f"{folder} holds {', '.join(names[:3])}{' and more' if names[3:] else ''} and was not written by this "
            "system, so it is not replaced: choose another folder, or move it away"
        )
    return [name for name in names if name not in ours]


def described(path: Path) -> bool:
    """Whether a safetensors file carries a description of ours."""
    try:
        return "format" in read_description(path)
    except ValueError:
        return False


def keep(source: Path, target: Path) -> None:
    """A file or folder under a second name, without a copy of its bytes where the file system can."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(source, target)


def link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # no hard links there
        shutil.copy2(source, target, follow_symlinks=False)


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, but not those of folders inside it that have a mark of their own."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            found.append(path)
        elif not (path / MARK).is_file():
            found += files_of(path)
    return found


def mark_of(folder: Path, kind: str) -> str:
    # pipeline.json has a digest of its own, of what we wrote into it: people add names of classes
    paths = [path for path in files_of(folder) if path.name != PIPELINE]
    files = {str(p.relative_to(folder)): [p.stat().st_size, file_digest(p)] for p in paths}
    content = {"format": 1, "kind": kind, "entries": sorted(os.listdir(folder)), "files": files}
    return json.dumps(content | {"digest": settings_digest(content)}, indent=1) + "\n"


def read_mark(folder: Path) -> dict:
    """The mark of a folder. Raises ValueError where it is damaged."""
    content = read_json(folder / MARK)
    require_kinds(content, {"entries": list, "files": dict, "digest": str}, folder / MARK)
    digest = content.pop("digest")
    if settings_digest(content) != digest:
        raise ValueError(f"{folder / MARK} is damaged: its own digest does not fit; copy the folder again")
    return content


@with_home
def check_files(folder: str | Path) -> None:
    """Raises ValueError naming the first file of a folder of ours that is missing or not what was written."""
    folder = Path(folder)
    if not (folder / MARK).is_file():
        log.warning("%s has no %s: its files are used without a check of their digests", folder, MARK)
        return
    for name, (size, digest) in read_mark(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy the folder again")
        if path.stat().st_size != size:
            raise ValueError(
                f"{path} is truncated or damaged: it has {path.stat().st_size} bytes instead of {size}; copy it again"
            )
        if file_digest(path) != digest:
            raise ValueError(
                f"{path} is damaged: its SHA-256 is another than when it was written (a flipped bit, or a file of "
                "another model); copy it again"
            )
