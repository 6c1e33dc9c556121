"""What has changed in a source since it was screened: images added, changed, renamed, deleted, or of another class."""

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sfd_fast.data.images.index import ImageIndex
from sfd_fast.data.images.listing import Scan
from sfd_fast.data.images.screening import Finding, stamps
from sfd_fast.data.images.sources import Reader

Name = tuple[str, str]
"""(name of the tar file or "", key): an image's name within its source"""


@dataclass
class Changes:
    """Names of images that differ from an index."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    """to another class"""

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.gone or self.moved)

    def __str__(self) -> str:
        kinds = {"added": self.added, "changed": self.changed, "gone": self.gone, "of another class": self.moved}
        parts = [f"{len(names)} {kind}, such as {names[0]}" for kind, names in kinds.items() if names]
        return f"{sum(map(len, kinds.values()))} files differ from the index ({'; '.join(parts)})"


def untouched(index: ImageIndex) -> bool:
    """Whether the files that hold the images (tar files, a data set's) are as they were, so that no look is needed."""
    kind, containers = index.metadata["kind"], index.metadata["containers"]
    if kind == "folder":
        return False
    root = Path(index.metadata["root"])
    if kind == "tar" and root.is_dir() and len(list(root.glob("[!.]*.tar"))) != len(containers):
        return False
    return stamps(kind, index.metadata["root"], containers) == index.metadata["stamps"]


def compare(found: Scan, index: ImageIndex, num_threads: int) -> tuple[Changes, dict[int, Finding]]:
    """What differs between a new scan and an index; and what the index knows of the images of the scan, by number.

    An image of the same size that was written since is read, and compared by its checksum.
    """
    names = list(names_of(found))
    skipped = {tuple(entry[:2]): tuple(entry[2:]) for entry in index.metadata["skipped"]}
    old = {name: i for i, name in enumerate(index_names(index))}
    changes, known, unsure = Changes(), {}, []
    for i, name in enumerate(names):
        size, time = found.sizes[i], found.times[i]
        j = old.pop(name, None)
        if j is None:
            if skipped.get(name) != (size, time):
                changes.added.append(found.keys[i])
            continue
        if size and size != index.sizes[j]:
            changes.changed.append(found.keys[i])
            continue
        if time != index.times[j]:
            unsure.append((i, j))
            continue
        known[i] = index.finding(j)
        note_class(changes, found, index, i, j)
    reader = Reader(found.kind, found.root, found.containers)

    def same(pair: tuple[int, int]) -> bool:
        i, j = pair
        try:
            data = reader.read(found.keys[i], found.container[i], found.offsets[i], found.sizes[i])
        except OSError:
            return False
        return zlib.crc32(data) == index.checksums[j]

    with ThreadPoolExecutor(max(num_threads, 1), thread_name_prefix="compare") as pool:
        for (i, j), is_same in zip(unsure, pool.map(same, unsure)):
            if is_same:
                known[i] = index.finding(j)
                note_class(changes, found, index, i, j)
            else:
                changes.changed.append(found.keys[i])
    changes.gone = [index.key(j) for j in old.values()]
    return changes, known


def note_class(changes: Changes, found: Scan, index: ImageIndex, i: int, j: int) -> None:
    if found.labels[i] != index.labels[j]:
        changes.moved.append(found.keys[i])


def names_of(found: Scan) -> Iterable[Name]:
    tars = [os.path.basename(path) for path in found.containers] or [""]
    return ((tars[container], key) for container, key in zip(found.container, found.keys))


def index_names(index: ImageIndex) -> Iterable[Name]:
    tars = [os.path.basename(path) for path in index.metadata["containers"]] or [""]
    return ((tars[int(index.containers[i])], index.key(i)) for i in np.arange(len(index)))
