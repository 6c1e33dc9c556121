"""Shard files: safetensors written in one streaming pass with the same bytes every time, and read through a memory map.

A shard is an ordinary safetensors file (docs/METHOD.md 6), so any reader of the format opens it. Letters:
N samples of a shard.
"""

import json
import math
import mmap
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from sfd_fast.config import require
from sfd_fast.files.atomic import AtomicFile, write_atomically
from sfd_fast.files.home import with_home
from sfd_fast.files.messages import first_line

METADATA_KEY = "sfd"
"""The only metadata key. Several keys are written in a different order by different processes."""

MAX_HEADER = 100_000_000
"""bytes; the limit of safetensors itself"""
OTHER_FILES = 256
"""open files of a process beside its shards: a map holds one for each of them"""
PAGE = 4096
"""bytes of a memory page"""
BORDER = 4 * PAGE
"""our shards' large rows begin on multiples of this: longer runs are copied faster"""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: where its bytes lie, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What the first bytes of a shard say."""

    entries: dict[str, Entry]
    metadata: dict
    size: int
    """of the whole file, bytes"""


@with_home
def read_header(path: str | Path) -> Header:
    """The tensors and metadata of a shard, checked against each other and the file's size.

    Raises FileNotFoundError for a missing file, ValueError (naming the file) for one that is truncated or no shard.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"{path} is no safetensors file or is truncated: {size} bytes, a header of {length}")
        text = file.read(length)
    try:
        table = json.loads(text)
        metadata = table.pop("__metadata__", {})
        entries = {name: _entry(row, 8 + length) for name, row in table.items()}
        metadata = json.loads(metadata.get(METADATA_KEY, "{}"))
        require(isinstance(metadata, dict), f"its metadata '{METADATA_KEY}' is no group")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no safetensors file, or of a kind that is not read here: its header is wrong "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise ValueError(f"{path} is damaged: tensor '{name}' begins at byte {entry.begin}, not at {end}")
        end = entry.end
    if size != end:
        raise ValueError(
            f"{path} is truncated or damaged: {size} bytes, its header describes {end}; copy it again, or run the "
            "command that made it again: that encodes only shards that are missing or damaged"
        )
    return Header(entries, metadata, size)


def _entry(row: dict, start: int) -> Entry:
    """A row of a header's table. Raises ValueError, TypeError or KeyError where it is wrong."""
    require(row["dtype"] in DTYPES, f"dtype {row['dtype']}; supported: {', '.join(DTYPES)}")
    dtype, shape = DTYPES[row["dtype"]], tuple(row["shape"])
    begin, end = row["data_offsets"]
    require(all(type(n) is int and n >= 0 for n in (*shape, begin, end)), f"shape {shape} at {begin} to {end}")
    require(end - begin == math.prod(shape) * dtype.itemsize, f"shape {shape} does not fill its {end - begin} bytes")
    return Entry(dtype, shape, start + begin, start + end)


def allow_open_files(count: int) -> None:
    """Raises the soft limit on open files, where it is lower than `count` mapped shards and some others need.

    Raises OSError naming the limit where the hard one does not allow it.
    """
    needed = count + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise OSError(
                f"{count} shards need {needed} open files, this process may open {hard} (`ulimit -Hn`): raise that "
                "limit, or encode with a larger --shard_size"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@with_home
def map_tensors(path: str | Path, header: Header) -> dict[str, Tensor]:
    """Read-only tensors over a memory map of the file: nothing is read until it is used, nothing is copied.

    The map stays open as long as one of the tensors lives.
    """
    if header.size == 0 or not header.entries:
        return {}
    with Path(path).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content = np.frombuffer(mapped, dtype=np.uint8)
    return {name: _as_tensor(content[entry.begin : entry.end], entry) for name, entry in header.entries.items()}


def _as_tensor(content: np.ndarray, entry: Entry) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        # torch warns that the memory is read-only; nobody writes to these tensors
        warnings.simplefilter("ignore", UserWarning)
        raw = torch.from_numpy(content)
    if raw.data_ptr() % entry.dtype.itemsize:
        raw = raw.clone()
    return raw.view(entry.dtype).view(entry.shape)


def build_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping) -> tuple[bytes, dict]:
    """The header of a shard with those tensors, and where each of them begins and ends.

    Tensors whose rows are whole pages come first, and begin on page borders, for the loader's sake; then the others by
    falling element size, so that all are aligned.
    Returns (bytes, {name: Entry}); the same arguments give the same bytes in every process.
    """
    def place(name: str) -> tuple[bool, int, str]:
        dtype, shape = tensors[name]
        return math.prod(shape[1:]) * dtype.itemsize % PAGE != 0, -dtype.itemsize, name

    order = sorted(tensors, key=place)
    table: dict = {"__metadata__": {METADATA_KEY: json.dumps(metadata, sort_keys=True)}}
    offset = 0
    for name in order:
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % (64 if place(order[0])[0] else BORDER))
    start = 8 + len(text)
    entries = {
        name: Entry(tensors[name][0], tuple(tensors[name][1]), *(start + o for o in table[name]["data_offsets"]))
        for name in order
    }
    return len(text).to_bytes(8, "little") + text, entries


class ShardWriter:
    """A shard that is filled row by row with bounded memory and appears under its name only when it is complete.

    with ShardWriter(path, {"latents": (torch.float32, (N, 32, 16, 16)), ...}, metadata) as writer:
        writer.write("latents", first_row, rows)        # in any order; rows: (n, ...)

    The bytes go to a temporary file beside the target (space for it is reserved at once), are synchronised to the disk
    and renamed: a process that dies at any moment leaves either the whole shard or none. An exception inside the
    block removes the temporary file. Raises OSError naming the file where the disk is full.
    """

    @with_home
    def __init__(
        self,
        path: str | Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping | None = None,
    ):
        self.path = Path(path)
        header, self.entries = build_header(tensors, metadata or {})
        self._missing = {name: entry.shape[0] for name, entry in self.entries.items()}
        size = max((entry.end for entry in self.entries.values()), default=len(header))
        self._file = AtomicFile(path, reserve=size)
        try:
            self._file.write(header)
        except OSError:
            self._file.abandon()
            raise

    def write(self, name: str, row: int, values: Tensor) -> None:
        """Stores values (n, ...) as rows row .. row + n - 1 of tensor `name`, cast to its dtype."""
        entry = self.entries[name]
        if values.shape[1:] != entry.shape[1:] or row + len(values) > entry.shape[0]:
            raise ValueError(
                f"{self.path}: rows {row} to {row + len(values)} of shape {tuple(values.shape[1:])} do not fit tensor "
                f"'{name}' of shape {entry.shape}"
            )
        values = values.detach().to("cpu", entry.dtype).contiguous()
        row_bytes = (entry.end - entry.begin) // max(entry.shape[0], 1)
        self._file.write(values.view(-1).view(torch.uint8).numpy().data, entry.begin + row * row_bytes)
        self._missing[name] -= len(values)

    def close(self) -> None:
        """Completes the shard. Raises ValueError where rows were not written."""
        missing = {name: count for name, count in self._missing.items() if count}
        if missing:
            self._file.abandon()
            raise ValueError(f"{self.path} is incomplete: rows never written: {missing}")
        self._file.commit()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.abandon()


@with_home
def write_shard(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping | None = None) -> None:
    """Writes whole tensors as one shard, atomically, with one sorted-JSON metadata key.

    tensors: for example latents, latents_flip (N, C, H, W), latents_sv, latents_sv_flip, labels (N,), and optionally
    feats_dino, feats_dino_flip (N, F, h, w). All share N.
    Raises ValueError where the counts differ, OSError naming the file where the disk is full.
    """
    counts = {name: len(value) for name, value in tensors.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{path}: the tensors of a shard must have equally many samples, got {counts}")
    with ShardWriter(path, {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, metadata) as writer:
        for name, value in tensors.items():
            writer.write(name, 0, value)


@with_home
def write_json(path: str | Path, content: Mapping) -> None:
    """Sorted JSON, written atomically. Raises OSError naming the file where the disk is full."""
    write_atomically(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
