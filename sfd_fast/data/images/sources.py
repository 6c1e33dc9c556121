"""Where images come from: a class-per-folder tree, WebDataset tar shards, or a Hugging Face dataset.

Scanning lists the images without decoding any; a Reader fetches the encoded bytes of one of them.
"""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfd_fast.data.images.decode import EXTENSIONS
from sfd_fast.data.images.listing import NO_CLASS, Scan, is_hidden
from sfd_fast.data.images.tables import HUB, column, is_dataset, open_dataset, scan_dataset
from sfd_fast.data.images.tars import scan_tars
from sfd_fast.files.home import with_home


@with_home
def scan(path: str | Path) -> Scan:
    """Lists the images of a source; the kind is recognised from what is there. Hidden names are passed over.

    A folder with *.tar files and no class folders, or one such file: WebDataset. A folder saved by `datasets` or with
    *.parquet files, or hf://ORGANISATION/NAME: a Hugging Face dataset. Any other folder: one sub-folder per class, or
    images alone, which are then of one class.
    Raises FileNotFoundError for a missing path, ValueError for a source without images, or a class without any.
    """
    if str(path).startswith(HUB):
        return scan_dataset(str(path))
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(
            f"{root} does not exist; images are a folder with one sub-folder per class, *.tar shards (WebDataset), or "
            "a saved Hugging Face dataset"
        )
    tars = [] if root.is_file() else sorted(path.name for path in root.glob("*.tar") if not is_hidden(path.name))
    if root.is_file() or (tars and not any(walk(folder) for folder in class_folders(root))):
        return scan_tars(root)
    if is_dataset(root):
        return scan_dataset(str(root))
    found = scan_folder(root)
    if tars:
        found.notes.append(f"{root} has class folders: its {len(tars)} *.tar files, such as {tars[0]}, are ignored")
    return found


def class_folders(root: Path) -> list[Path]:
    """In the order of their labels: by number where all names are numbers, else by name."""
    names = [entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name)]
    numeric = all(name.isascii() and name.isdecimal() for name in names)
    return [root / name for name in sorted(names, key=lambda name: (int(name), name) if numeric else name)]


def walk(folder: Path, *, deep: bool = True) -> list[str]:
    """Image files below a folder (deep=False: in it), sorted folder by folder; links are followed, never in circles."""
    return list(_walk(str(folder), deep, set()))


def _walk(folder: str, deep: bool, above: set[tuple[int, int]]) -> Iterator[str]:
    status = os.stat(folder)
    place = (status.st_dev, status.st_ino)
    if place in above:
        return
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    folders = [entry for entry in found if entry.is_dir()]
    for entry in found:
        if not entry.is_dir() and entry.name.lower().endswith(EXTENSIONS):
            yield entry.path
    if deep:
        for entry in folders:
            yield from _walk(entry.path, deep, above | {place})


def scan_folder(root: Path) -> Scan:
    """One class per sub-folder of root, deeper folders belong to it; images without sub-folders are of one class."""
    folders = class_folders(root)
    loose = walk(root, deep=False)
    if not folders and not loose:
        raise ValueError(f"{root} has no sub-folders: one folder per class is expected, with images in it, or images")
    result = Scan("folder", str(root), [folder.name for folder in folders] or [NO_CLASS])
    special = []
    if not folders:
        result.notes.append(f"{root} has no sub-folders: all of its images are of one class")
    elif loose:
        result.notes.append(
            f"{root}: {len(loose)} images, such as {os.path.basename(loose[0])}, lie in no class folder: left out"
        )
    for label, folder in enumerate(folders or [root]):
        before = len(result.keys) + len(result.unreadable)
        for path in loose if not folders else walk(folder):
            size = time = 0
            # a dangling link is found, and listed, when it is read
            if os.path.exists(path):
                status = os.stat(path)
                if not stat.S_ISREG(status.st_mode):
                    special.append(path)
                    continue
                size, time = status.st_size, status.st_mtime_ns
            result.add(os.path.relpath(path, root), label, size=size, time=time)
        if len(result.keys) + len(result.unreadable) == before:
            raise ValueError(
                f"class folder {folder} holds no images ({', '.join(EXTENSIONS)}): remove the folder, or fill it"
            )
    if special:
        result.notes.append(f"{root}: {len(special)} names are pipes, sockets or devices, the first is {special[0]}: "
                            "left out")  # fmt: skip
    return result


def read_regular(path: str) -> bytes:
    """The bytes of a file. OSError where it is no regular file: a pipe would wait for a writer."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError("it is no regular file")
        return file.read()


class Reader:
    """Encoded bytes of the images of a scan, by any number of threads."""

    def __init__(self, kind: str, root: str, containers: list[str]):
        self.kind, self.root, self.containers = kind, root, containers
        self._rows: Any = None
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, key: str, container: int, offset: int, size: int) -> bytes:
        """Raises OSError naming the file where it cannot be read."""
        if self.kind == "folder":
            return read_regular(os.path.join(self.root, key))
        if self.kind == "tar":
            with self._lock:
                if container not in self._files:
                    self._files[container] = os.open(self.containers[container], os.O_RDONLY)
            return os.pread(self._files[container], size, offset)
        with self._lock:
            if self._rows is None:
                self._rows = open_dataset(self.root)
                self._image = column(self._rows, "image")
            value = self._rows[int(key)][self._image]
        if value is None:
            raise OSError(f"{self.root}: row {key} has no image")
        if value["bytes"] is not None:
            return value["bytes"]
        return read_regular(value["path"])

    def describe(self, key: str, container: int) -> str:
        """A name of the image that tells a person where it is."""
        if self.kind == "folder":
            return os.path.join(self.root, key)
        if self.kind == "tar":
            return f"{self.containers[container]}:{key}"
        return f"{self.root}: row {key}"

    def __del__(self) -> None:
        for number in self._files.values():
            os.close(number)


