"""Screening: every image of a source is decoded once, and what was learnt is written as its index.

Divided over the ranks. A screening that was killed continues: findings are kept in journals until the index is there.
"""

import dataclasses
import io
import json
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sfd_fast.data.cache.shards import ShardWriter, write_json
from sfd_fast.data.images.decode import DEEP, ROTATED, TRANSPARENT, decode_with_traits, is_thin
from sfd_fast.data.images.listing import Scan
from sfd_fast.data.images.sources import Reader
from sfd_fast.data.images.tables import written
from sfd_fast.data.progress import Progress
from sfd_fast.files.atomic import TEMPORARY
from sfd_fast.ranks import Ranks

REPORT_FILE = "unreadable.json"
SCREEN_BLOCK = 256
"""images handed to the threads at a time: what a killed screening may have to repeat"""
COLUMNS = {
    "labels": torch.int32, "widths": torch.int32, "heights": torch.int32, "containers": torch.int32,
    "offsets": torch.int64, "sizes": torch.int64, "times": torch.int64, "checksums": torch.int64,
    "plain": torch.uint8, "traits": torch.uint8,
}  # fmt: skip
TRAITS = (ROTATED, TRANSPARENT, DEEP)
"""in the order of their bits in the column `traits`"""


@dataclass(frozen=True, slots=True)
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
    traits: tuple[str, ...] = ()
    """in which decoders differ, of sfd_fast.data.images.decode"""


def examine(data: bytes) -> Finding:
    """Decodes an image fully. An error is a finding, not an exception."""
    try:
        image, traits = decode_with_traits(data, (255, 255, 255))
        plain = not traits and not is_thin(image.size) and is_plain(data)
    except Exception as error:  # damaged files raise nearly anything within PIL: TypeError, struct.error, MemoryError
        what = [] if isinstance(error, OSError) and str(error) else [type(error).__name__]
        return Finding(size=len(data), error=": ".join([*what, *filter(None, [str(error)])]))
    return Finding(image.width, image.height, len(data), zlib.crc32(data), plain, "", tuple(sorted(traits)))


def is_plain(data: bytes) -> bool:
    """Whether every decoder agrees on what an image shows: see Finding.plain."""
    with Image.open(io.BytesIO(data)) as header:
        if header.format not in ("JPEG", "PNG") or getattr(header, "n_frames", 1) > 1:
            return False
        # PIL calls RGB of 16 bits RGB too; IHDR, the first chunk of a PNG, has the bits of a channel in byte 24
        deep = header.format == "PNG" and data[24] != 8
        return header.mode in ("RGB", "L") and not deep and "transparency" not in header.info


class Journals:
    """Findings of a screening in progress, one JSON line for each image, in a file for each rank.

    Their names hold the identity of the scan: findings of other images are not used. What is left is swept away with
    the temporary files.
    """

    def __init__(self, folder: Path, found: Scan):
        places = [found.container, found.offsets, found.sizes, found.times]
        listing = json.dumps([found.kind, found.root, found.containers, found.keys, *places])
        self.folder, self.name = folder, f"{TEMPORARY}screened-{sha256(listing.encode()).hexdigest()[:16]}"

    def read(self) -> dict[int, Finding]:
        """What all ranks of earlier runs found, by the number of the image."""
        findings = {}
        for path in self.folder.glob(f"{self.name}-*"):
            for line in path.read_text().splitlines():
                try:
                    number, values = json.loads(line)
                except ValueError:  # half a line: killed while writing it
                    continue
                findings[number] = Finding(**values)
        return findings

    def add(self, rank: int, findings: dict[int, Finding]) -> None:
        """Appends a block. Raises OSError naming the file where the disk is full."""
        path = self.folder / f"{self.name}-{rank}"
        lines = [json.dumps([number, dataclasses.asdict(finding)]) for number, finding in findings.items()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write("\n" + "\n".join(lines))
        except OSError as error:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error

    def remove(self) -> None:
        for path in self.folder.glob(f"{TEMPORARY}screened-*"):
            path.unlink(missing_ok=True)


def screen(
    found: Scan,
    path: Path,
    *,
    num_threads: int,
    ranks: Ranks,
    report: Callable[[str], None],
    known: dict[int, Finding] | None = None,
) -> None:
    """Decodes every image once, divided over the ranks, and writes index and report (rank 0).

    known: what is known already of some of them, by their number.
    """
    reader = Reader(found.kind, found.root, found.containers)

    def look(i: int) -> Finding:
        try:
            return examine(reader.read(found.keys[i], found.container[i], found.offsets[i], found.sizes[i]))
        except OSError as error:
            return Finding(error=str(error))

    if ranks.first:
        for note in (*found.notes, *filter(None, [empty_classes(found.labels, found.classes, found.root)])):
            report(note)
    journals = Journals(path.parent, found)
    known = (known or {}) | ranks.gather(journals.read() if ranks.first else {})[0]
    if known and ranks.first:
        report(f"screening: {len(known)} of {len(found.keys)} images are known from a run before")
    left = [i for i in range(len(found.keys)) if i not in known]
    mine, findings = [left[j] for j in ranks.mine(len(left))], {}
    progress = Progress("screening", len(mine), ranks, report)
    with ThreadPoolExecutor(max(num_threads, 1), thread_name_prefix="screen") as pool:
        for first in range(0, len(mine), SCREEN_BLOCK):
            block = mine[first : first + SCREEN_BLOCK]
            looked = dict(zip(block, pool.map(look, block)))
            journals.add(ranks.rank, looked)
            findings |= looked
            progress.add(len(looked))
    for share in ranks.gather(findings):
        known |= share

    def finish() -> None:
        ordered = [known[i] for i in range(len(found.keys))]
        bad = found.unreadable | {
            reader.describe(key, container): finding.error
            for key, container, finding in zip(found.keys, found.container, ordered)
            if finding.error
        }
        write_json(path.with_name(REPORT_FILE), bad)
        if bad:
            count = len(ordered) + len(found.unreadable)
            report(f"{len(bad)} of {count} images are unreadable, listed in {path.with_name(REPORT_FILE)}")
        write_index(path, found, ordered)
        journals.remove()

    ranks.on_first(finish)


def empty_classes(labels: Sequence[int], classes: Sequence[str], root: str) -> str:
    """What to say of classes that no label names; empty where there is none."""
    present = set(map(int, labels))
    empty = [name for label, name in enumerate(classes) if label not in present]
    if not empty:
        return ""
    shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
    return f"{len(empty)} of {len(classes)} classes of {root} have no images: {shown}"


def stamps(kind: str, root: str, containers: Sequence[str]) -> dict[str, int]:
    """When the files that hold the images were last written, ns; nothing for folders, where each image has its own."""
    if kind == "dataset":
        return {root: written(root)}
    return {os.path.basename(path): os.stat(path).st_mtime_ns for path in containers}


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
        "times": [found.times[i] for i in good],
        "plain": [findings[i].plain for i in good],
        "traits": [sum(1 << TRAITS.index(trait) for trait in findings[i].traits) for i in good],
    }
    tars = [os.path.basename(path) for path in found.containers] or [""]
    tensors: dict[str, Tensor] = {name: torch.tensor(column, dtype=COLUMNS[name]) for name, column in columns.items()}
    tensors["name_ends"] = torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0)
    tensors["names"] = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
    metadata = {
        "kind": found.kind,
        "root": found.root,
        "classes": found.classes,
        "containers": found.containers,
        "unreadable": len(findings) - len(good) + len(found.unreadable),
        "skipped": [
            [tars[found.container[i]], found.keys[i], found.sizes[i], found.times[i]]
            for i, finding in enumerate(findings)
            if finding.error
        ],
        "stamps": stamps(found.kind, found.root, found.containers),
    }
    with ShardWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor)
