"""Screening: every image is decoded once, and what was learnt (labels, sizes, checksums, damage) is kept in an index.

Later runs read the index instead of walking the source, and notice files that changed since. N images.
"""

import io
import json
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfd_fast.data.images import decode
from sfd_fast.data.ranks import Ranks
from sfd_fast.data.shards import ShardWriter, map_tensors, read_header, write_json
from sfd_fast.data.sources import Reader, Scan, scan

INDEX_FOLDER = "index"
"""within the folder of a cache"""
INDEX_FILE = "index.safetensors"
REPORT_FILE = "unreadable.json"
SCREEN_BLOCK = 256
"""images handed to the threads at a time"""
COLUMNS = {
    "labels": torch.int32, "widths": torch.int32, "heights": torch.int32, "containers": torch.int32,
    "offsets": torch.int64, "sizes": torch.int64, "checksums": torch.int64, "plain": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What decoding one image told."""

    width: int = 0
    height: int = 0
    size: int = 0
    checksum: int = 0
    """CRC-32 of the encoded bytes"""
    plain: bool = False
    """a still 8-bit RGB or grey JPEG or PNG without transparency: every decoder agrees on what it shows"""
    error: str = ""


def examine(data: bytes) -> Finding:
    """Decodes an image fully. An error is a finding, not an exception."""
    try:
        image = decode(data)
        plain = is_plain(data)
    except Exception as error:  # damaged files raise nearly anything within PIL: TypeError, struct.error, MemoryError
        what = [] if isinstance(error, OSError) and str(error) else [type(error).__name__]
        return Finding(size=len(data), error=": ".join([*what, *filter(None, [str(error)])]))
    return Finding(image.width, image.height, len(data), zlib.crc32(data), plain)


def is_plain(data: bytes) -> bool:
    """Whether every decoder agrees on what an image shows: see Finding.plain."""
    with Image.open(io.BytesIO(data)) as header:
        if header.format not in ("JPEG", "PNG") or getattr(header, "n_frames", 1) > 1:
            return False
        # PIL calls RGB of 16 bits RGB too; IHDR, the first chunk of a PNG, has the bits of a channel in byte 24
        deep = header.format == "PNG" and data[24] != 8
        return header.mode in ("RGB", "L") and not deep and "transparency" not in header.info


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
        header = read_header(path)
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

    Unreadable images are listed with the reason in unreadable.json: skipped, or fatal with on_bad="fail".
    Raises ValueError for unreadable images where they are fatal, for a class that has no readable image, and for an
    index that belongs to another source.
    """
    ranks = ranks or Ranks()
    path = Path(folder, INDEX_FILE)
    present = ranks.gather(path.is_file())
    if not all(present):
        screen(source, path, on_bad=on_bad, num_threads=num_threads, ranks=ranks, report=report)
    index = ImageIndex.load(path)
    if index.metadata["root"] != _root(source):
        raise ValueError(
            f"{path} is the index of {index.metadata['root']}, not of {source}: use another output folder, or delete "
            "the index if the images only moved"
        )
    if on_bad == "fail" and index.metadata["unreadable"]:
        _refuse(index.metadata["unreadable"], path.with_name(REPORT_FILE))
    return index


def _root(source: str | Path) -> str:
    return str(source) if "://" in str(source) else str(Path(source).resolve())


def screen(
    source: str | Path,
    path: Path,
    *,
    on_bad: str,
    num_threads: int,
    ranks: Ranks,
    report: Callable[[str], None],
) -> None:
    """Decodes every image of the source once, divided over the ranks, and writes index and report (rank 0)."""
    found = scan(_root(source))
    reader = Reader(found.kind, found.root, found.containers)

    def look(i: int) -> Finding:
        try:
            return examine(reader.read(found.keys[i], found.container[i], found.offsets[i], found.sizes[i]))
        except OSError as error:
            return Finding(error=str(error))

    mine, start, findings = ranks.mine(len(found.keys)), time.monotonic(), []
    with ThreadPoolExecutor(max(num_threads, 1), thread_name_prefix="screen") as pool:
        last = start
        for first in range(0, len(mine), SCREEN_BLOCK):
            findings += pool.map(look, mine[first : first + SCREEN_BLOCK])
            if ranks.first and time.monotonic() - last > 10:
                last, done = time.monotonic(), len(findings)
                rate = done / (last - start)
                report(f"screening: {done}/{len(mine)} images, {rate:.0f}/s, {(len(mine) - done) / rate:.0f} s left")
    shares = ranks.gather(findings)

    def finish() -> None:
        ordered = [shares[i % ranks.size][i // ranks.size] for i in range(len(found.keys))]
        bad = {
            reader.describe(key, container): finding.error
            for key, container, finding in zip(found.keys, found.container, ordered)
            if finding.error
        }
        write_json(path.with_name(REPORT_FILE), bad)
        if bad:
            report(f"{len(bad)} of {len(ordered)} images are unreadable, listed in {path.with_name(REPORT_FILE)}")
        write_index(path, found, ordered)

    ranks.on_first(finish)


def write_index(path: Path, found: Scan, findings: Sequence[Finding]) -> None:
    """Raises ValueError where a class has no readable image."""
    good = [i for i, finding in enumerate(findings) if not finding.error]
    empty = set(found.labels) - {found.labels[i] for i in good}
    if empty:
        name = found.classes[min(empty)]
        raise ValueError(f"class '{name}' of {found.root} has no readable image: all of its files are damaged")
    names = [found.keys[i].encode() for i in good]
    columns = {
        "labels": [found.labels[i] for i in good],
        "widths": [findings[i].width for i in good],
        "heights": [findings[i].height for i in good],
        "containers": [found.container[i] for i in good],
        "offsets": [found.offsets[i] for i in good],
        "sizes": [findings[i].size for i in good],
        "checksums": [findings[i].checksum for i in good],
        "plain": [findings[i].plain for i in good],
    }
    tensors: dict[str, Tensor] = {name: torch.tensor(column, dtype=COLUMNS[name]) for name, column in columns.items()}
    tensors["name_ends"] = torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0)
    tensors["names"] = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
    metadata = {
        "kind": found.kind,
        "root": found.root,
        "classes": found.classes,
        "containers": found.containers,
        "unreadable": len(findings) - len(good),
    }
    with ShardWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor)


def _refuse(count: int, report: Path) -> None:
    bad = json.loads(report.read_text())
    name, reason = next(iter(bad.items()))
    raise ValueError(
        f"{count} images are unreadable, the first is {name} ({reason}); all are listed in {report}. Repair or remove "
        "them and delete the index, or pass on_bad=skip"
    )
