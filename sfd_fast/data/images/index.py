"""The index of a source: what screening learnt of its readable images (labels, sizes, checksums), kept in a file.

Later runs read the index instead of walking the source, and notice files that changed since. N images.
"""

import json
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np

from sfd_fast.data.cache.shards import map_tensors, read_header
from sfd_fast.data.images.screening import COLUMNS, REPORT_FILE, empty_classes, screen
from sfd_fast.data.images.sources import Reader
from sfd_fast.ranks import Ranks

INDEX_FOLDER = "index"
"""within the folder of a cache"""
INDEX_FILE = "index.safetensors"


class ImageIndex:
    """The readable images of a source, in a fixed order. Columns are arrays of length N."""

    def __init__(self, columns: dict[str, np.ndarray], names: bytes, metadata: dict):
        self.labels, self.widths, self.heights = columns["labels"], columns["widths"], columns["heights"]
        self.containers, self.offsets, self.sizes = columns["containers"], columns["offsets"], columns["sizes"]
        self.checksums, self.plain = columns["checksums"], columns["plain"].astype(bool)
        self._names, self._ends = names, columns["name_ends"]
        self.metadata, self.classes = metadata, metadata["classes"]
        self._reader = Reader(metadata["kind"], metadata["root"], metadata["containers"])

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, i: int) -> str:
        start = int(self._ends[i - 1]) if i else 0
        return bytes(self._names[start : int(self._ends[i])]).decode()

    def describe(self, i: int) -> str:
        """Where image i is, for messages."""
        return self._reader.describe(self.key(i), int(self.containers[i]))

    def read(self, i: int) -> bytes:
        """Encoded bytes of image i. Raises OSError naming the file where it is gone or changed since screening."""
        try:
            data = self._reader.read(self.key(i), int(self.containers[i]), int(self.offsets[i]), int(self.sizes[i]))
        except OSError as error:
            raise OSError(f"{self.describe(i)} cannot be read any more: {error}") from error
        if zlib.crc32(data) != self.checksums[i]:
            raise OSError(
                f"{self.describe(i)} changed since it was screened ({len(data)} bytes, {self.sizes[i]} then): delete "
                f"the index ({INDEX_FILE}) to screen the images again"
            )
        return data

    def fingerprint(self) -> str:
        """SHA-256 over names, labels and checksums: the same images in the same order, wherever they lie."""
        digest = sha256(json.dumps(self.classes).encode())
        for part in (self._names, self._ends, self.labels, self.checksums):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def at(self, source: str | Path) -> "ImageIndex":
        """This index of the same images at another place; each is checked when it is read."""
        root = _root(source)
        moved = [str(Path(root, Path(name).name)) for name in self.metadata["containers"]]
        columns = {name: getattr(self, name) for name in COLUMNS} | {"name_ends": self._ends}
        return ImageIndex(columns, self._names, self.metadata | {"root": root, "containers": moved})

    @classmethod
    def load(cls, path: str | Path) -> "ImageIndex":
        """Raises ValueError naming a damaged file."""
        try:
            header = read_header(path)
        except ValueError as error:
            raise ValueError(
                f"the index of the images is damaged ({str(error).split(';')[0]}): delete {path}, and the next run "
                "screens the images again"
            ) from None
        columns = {name: value.numpy() for name, value in map_tensors(path, header).items()}
        return cls(columns, columns.pop("names"), header.metadata)


def open_index(
    source: str | Path,
    folder: str | Path,
    *,
    on_bad: Literal["skip", "fail"] = "skip",
    num_threads: int = 2,
    ranks: Ranks | None = None,
    report: Callable[[str], None] = print,
) -> ImageIndex:
    """The index of a source, kept in `folder`; screens the source where there is none yet.

    Unreadable images are listed with the reason in unreadable.json: skipped, or fatal with on_bad="fail". Likewise
    classes without images, where labels come from tar shards or a dataset.
    Raises ValueError for unreadable images where they are fatal, for a class that has no readable image, and for an
    index that belongs to another source.
    """
    ranks = ranks or Ranks()
    path = Path(folder, INDEX_FILE)
    present = ranks.gather(path.is_file())
    if not all(present):
        screen(_root(source), path, num_threads=num_threads, ranks=ranks, report=report)
    index = ImageIndex.load(path)
    if index.metadata["root"] != _root(source):
        raise ValueError(
            f"{path} is the index of {index.metadata['root']}, not of {source}: use another output folder, or delete "
            "the index if the images only moved"
        )
    if on_bad == "fail" and index.metadata["unreadable"]:
        _refuse(index.metadata["unreadable"], path.with_name(REPORT_FILE))
    empty = empty_classes(index.labels, index.classes, index.metadata["root"])
    if on_bad == "fail" and empty:
        raise ValueError(f"{empty}. Complete the images, or pass on_bad=skip")
    return index


def _root(source: str | Path) -> str:
    return str(source) if "://" in str(source) else str(Path(source).resolve())


def _refuse(count: int, report: Path) -> None:
    bad = json.loads(report.read_text())
    name, reason = next(iter(bad.items()))
    raise ValueError(
        f"{count} images are unreadable, the first is {name} ({reason}); all are listed in {report}. Repair or remove "
        "them and delete the index, or pass on_bad=skip"
    )
