"""The index of a source: what screening learnt of its readable images (labels, sizes, checksums), kept in a file.

Later runs read the index instead of walking the source, and notice files that changed since. N images.
"""

import json
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np

from sfd_fast.config import require
from sfd_fast.data.cache.shards import map_tensors, read_header
from sfd_fast.data.images.screening import COLUMNS, TRAITS, Finding
from sfd_fast.data.images.sources import Reader
from sfd_fast.files.home import with_home

INDEX_FOLDER = "index"
"""within the folder of a cache"""
INDEX_FILE = "index.safetensors"


class ImageIndex:
    """The readable images of a source, in a fixed order. Columns are arrays of length N."""

    def __init__(self, columns: dict[str, np.ndarray], names: bytes, metadata: dict):
        self.labels, self.widths, self.heights = columns["labels"], columns["widths"], columns["heights"]
        self.containers, self.offsets, self.sizes = columns["containers"], columns["offsets"], columns["sizes"]
        self.times, self.traits = columns["times"], columns["traits"]
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

    def finding(self, i: int) -> Finding:
        """What screening learnt of image i."""
        traits = tuple(trait for bit, trait in enumerate(TRAITS) if self.traits[i] >> bit & 1)
        numbers = (int(column[i]) for column in (self.widths, self.heights, self.sizes, self.checksums))
        return Finding(*numbers, bool(self.plain[i]), "", traits)

    def counts_of_traits(self) -> dict[str, int]:
        """How many images have each trait in which decoders differ."""
        return {trait: int((self.traits >> bit & 1).sum()) for bit, trait in enumerate(TRAITS)}

    def read(self, i: int) -> bytes:
        """Encoded bytes of image i. Raises OSError naming the file where it is gone or changed since screening."""
        try:
            data = self._reader.read(self.key(i), int(self.containers[i]), int(self.offsets[i]), int(self.sizes[i]))
        except OSError as error:
            raise OSError(f"{self.describe(i)} cannot be read any more: {error}") from error
        if zlib.crc32(data) != self.checksums[i]:
            raise OSError(
                f"{self.describe(i)} changed since it was screened ({len(data)} bytes, {self.sizes[i]} then): "
                "run the command again with --update"
            )
        return data

    def fingerprint(self, images: range | None = None) -> str:
        """SHA-256 over names, labels and checksums of all or some consecutive images, wherever they lie."""
        chosen = range(len(self)) if images is None else images
        part = slice(chosen.start, chosen.stop)
        first = int(self._ends[chosen.start - 1]) if chosen.start else 0
        ends = self._ends[part]
        digest = sha256(json.dumps(self.classes).encode())
        names = self._names[first : int(ends[-1]) if len(ends) else first]
        for column in (names, ends - first, self.labels[part], self.checksums[part]):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    @with_home
    def at(self, source: str | Path) -> "ImageIndex":
        """This index of the same images at another place; each is checked when it is read."""
        root = absolute(source)
        moved = [str(Path(root, Path(name).name)) for name in self.metadata["containers"]]
        columns = {name: getattr(self, name) for name in COLUMNS} | {"name_ends": self._ends}
        return ImageIndex(columns, self._names, self.metadata | {"root": root, "containers": moved})

    @classmethod
    @with_home
    def load(cls, path: str | Path) -> "ImageIndex":
        """Raises ValueError naming a damaged file."""
        try:
            header = read_header(path)
            columns = {name: value.numpy() for name, value in map_tensors(path, header).items()}
            return cls(columns, columns.pop("names"), header.metadata).checked()
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"the index of the images is damaged ({type(error).__name__}: {str(error).split(';')[0]}): delete "
                f"{path}, and the next run screens the images again"
            ) from None

    def checked(self) -> "ImageIndex":
        """Raises ValueError where columns contradict each other."""
        count, ends = len(self.labels), self._ends
        require(count > 0, "it has no images")
        require(all(len(getattr(self, name)) == count for name in COLUMNS) and len(ends) == count, "columns differ")
        whole = ends[-1] == len(self._names) and ends[0] >= 0 and (np.diff(ends) >= 0).all()
        require(bool(whole), "the ends of names do not rise to their length")
        for name, column, limit in (
            ("label", self.labels, len(self.classes)), ("container", self.containers, self._num_containers()),
        ):  # fmt: skip
            require(column.min() >= 0 and column.max() < limit, f"a {name} is not below {limit}")
        for name, kind in (("root", str), ("unreadable", int), ("skipped", list), ("stamps", dict), ("classes", list)):
            require(type(self.metadata[name]) is kind, f"'{name}' is wrong")
        return self

    def _num_containers(self) -> int:
        return max(len(self.metadata["containers"]), 1)


@with_home
def absolute(source: str | Path) -> str:
    """A source's absolute path; an address as it is."""
    return str(source) if "://" in str(source) else str(Path(source).resolve())
