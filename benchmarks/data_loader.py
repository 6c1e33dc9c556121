"""The latent loader against one file opened per sample and against a sequential read; part `loader` of data.py.

The bars are on raw batches: what the loader hands to the copy to a GPU, where batches are normalised. The baselines do
no more either: a sequential read gives raw bytes, a file per sample raw rows. Batches normalised on the CPU, which only
training on a CPU needs, are rows without a bar. The loader that is held against the bars is chosen beforehand: raw, no
worker threads. The cache is our layout (rows on page borders); the same values in the layout that safetensors itself
writes (released caches) are measured beside it. Latents are random: only their bytes matter.
"""

import gc
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from data_rows import row
from safetensors import safe_open
from safetensors.torch import save_file
from timing import spin, steady_memory
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sfd_fast.data.cache.shards import read_header, write_shard
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.data.load.loader import LatentLoader
from sfd_fast.diffusion.statistics import LatentStatistics

BATCH = 256
ROUNDS = 9
SHARD = 1024
SHAPES = {"latents": (32, 16, 16), "latents_sv": (16, 16, 16)}
SAMPLE_BYTES = 48 * 256 * 4
"""one flip of one image, float32"""


def write_cache(folder: Path, gib: float, write: Callable[[Path, dict[str, Tensor]], None]) -> list[str]:
    """A cache of at least `gib` GiB, float32, both flips, each shard by write(path, tensors). Returns its files."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name + flip: torch.randn(SHARD, *shape, generator=generator)
        for name, shape in SHAPES.items()
        for flip in ("", "_flip")
    }
    size = sum(value.nbytes for value in tensors.values())
    paths = [folder / f"shard{k:04d}.safetensors" for k in range(int(gib * 2**30 // size) + 1)]
    for path in paths:
        write(path, tensors | {"labels": torch.randint(0, 1000, (SHARD,), generator=generator)})
    LatentStatistics.identity(32, 16).save(folder)
    return [str(path) for path in paths]


class FilePerSample(Dataset):
    """The released way of reading: a shard is opened with safetensors for every sample, its rows sliced out."""

    def __init__(self, paths: list[str]):
        self.rows = [(path, i) for path in paths for i in range(read_header(path).entries["labels"].shape[0])]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        path, at = self.rows[i]
        flip = "_flip" if torch.rand(()) < 0.5 else ""
        with safe_open(path, framework="pt", device="cpu") as file:
            texture = file.get_slice(f"latents{flip}")[at : at + 1].squeeze(0)
            semantic = file.get_slice(f"latents_sv{flip}")[at : at + 1].squeeze(0)
            label = file.get_slice("labels")[at : at + 1].squeeze(0)
        return texture, semantic, label


def per_sample_rate(dataset: FilePerSample, num_batches: int) -> float:
    """Images/s of opening a file per sample, collated and joined, in one process."""
    generator = torch.Generator().manual_seed(int(time.time_ns() % 2**31))
    order = torch.randperm(len(dataset), generator=generator)[: BATCH * num_batches].tolist()
    start = time.perf_counter()
    for first in range(0, len(order), BATCH):
        samples = [dataset[i] for i in order[first : first + BATCH]]
        torch.cat([torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])], dim=1)
        torch.stack([s[2] for s in samples])
    return len(order) / (time.perf_counter() - start)


def data_loader_rate(dataset: FilePerSample, num_batches: int, workers: int) -> float:
    """The same in torch's DataLoader with worker processes, after they have started."""
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, multiprocessing_context="fork")
    batches = iter(loader)
    for _ in range(workers):
        next(batches)
    start = time.perf_counter()
    for _ in islice(batches, num_batches):
        pass
    rate = BATCH * num_batches / (time.perf_counter() - start)
    del batches
    return rate


def loader_rate(shards: LatentShards, workers: int, num_batches: int, *, raw: bool, start_step: int = 0) -> float:
    """Images/s of LatentLoader: raw in host memory as a GPU copies them, or normalised on the CPU as well."""
    loader = LatentLoader(shards, BATCH, 0, num_workers=workers, start_step=start_step)
    batches = loader.raw() if raw else iter(loader)
    for _ in islice(batches, workers + 2):
        pass
    start = time.perf_counter()
    for _ in islice(batches, num_batches):
        pass
    rate = BATCH * num_batches / (time.perf_counter() - start)
    batches.close()
    return rate


def read_bytes_per_s(paths: list[str], num_bytes: int) -> float:
    """Bytes/s of reading files in their order, from the first byte on, into one buffer of a batch's size."""
    buffer = memoryview(bytearray(BATCH * SAMPLE_BYTES))
    done, start = 0, time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while done < num_bytes and (count := file.readinto(buffer)):
                done += count
    return done / (time.perf_counter() - start)


def size_of(paths: list[str]) -> int:
    return sum(os.path.getsize(path) for path in paths)


def forget(paths: list[str]) -> None:
    """Drops the files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_loader(folder: Path, gib: float) -> list[dict]:
    """Rows of both layouts, one cache after the other on the disk."""
    steady_memory()
    rows = []
    for layout, write, bars in (
        ("ours", write_shard, True),
        ("released layout", lambda path, tensors: save_file(tensors, path), False),
    ):
        cache = folder / "cache"
        paths = write_cache(cache, gib, write)
        rows += measure_layout(paths, layout, bars=bars)
        shutil.rmtree(cache)
    return rows


def measure_layout(paths: list[str], layout: str, *, bars: bool) -> list[dict]:
    """The competitors take turns in every round, and ratios are taken within a round."""
    cold = measure_cold(paths, layout)
    size = size_of(paths)
    read_bytes_per_s(paths, size)
    shards, dataset = LatentShards(paths), FilePerSample(paths)
    # of the released layout only what the bars would be on
    kinds = [(raw, workers) for raw in (True, False) for workers in (0, 1, 2)] if bars else [(True, 0)]
    found: dict = {kind: [] for kind in (*kinds, "per sample", "sequential", "canary")}
    # the first passes touch every page of the maps once; an epoch reads half of the file, one flip of each image
    epoch = len(shards) // BATCH
    first_pass = loader_rate(shards, 0, epoch, raw=True)
    for turn in range(1, 4):
        loader_rate(shards, 0, epoch, raw=True, start_step=turn * epoch)
    for turn in range(ROUNDS):
        found["canary"].append(spin())
        found["sequential"].append(read_bytes_per_s(paths, size))
        found["per sample"].append(per_sample_rate(dataset, 6))
        for raw, workers in kinds:
            found[raw, workers].append(loader_rate(shards, workers, epoch, raw=raw, start_step=turn * epoch))
    rows = [
        row(f"{layout}: cache", size / 2**30, "GiB", bar=4.0),
        row(f"{layout}: canary (fixed loop, steadiness of the machine)", found["canary"], "ms"),
        row(f"{layout}: one file opened per sample, safetensors, 1 process", found["per sample"], "images/s"),
        row(f"{layout}: sequential read, page cache", [v / 1e9 for v in found["sequential"]], "GB/s"),
        row(f"{layout}: loader, first pass over the maps", first_pass, "images/s"),
    ]
    if bars:
        with_workers = [data_loader_rate(dataset, 10, 2) for _ in range(3)]
        rows.append(row(f"{layout}: one file per sample, DataLoader, 2 processes", with_workers, "images/s"))
    for raw, workers in kinds:
        name = f"{layout}: loader, {'raw' if raw else 'normalised'}, {workers} workers"
        rows.append(row(name, found[raw, workers], "images/s"))
    for raw in (True, False) if bars else (True,):
        name = f"{layout}: loader, {'raw' if raw else 'normalised'}, 0 workers, over"
        over_sample = [a / b for a, b in zip(found[raw, 0], found["per sample"])]
        over_read = [a * SAMPLE_BYTES / b for a, b in zip(found[raw, 0], found["sequential"])]
        rows.append(row(f"{name} one file per sample", over_sample, "x", bar=20.0 if bars and raw else None))
        rows.append(row(f"{name} a sequential read", over_read, "x", bar=0.6 if bars and raw else None))
    held = held_bytes(paths)
    return [*rows, *cold, row(f"{layout}: memory held per sample", held, "bytes", bar=16.0, at_most=True)]


def cold_rounds(paths: list[str]) -> list[list[list[str]]]:
    """Up to three rounds of files for each of three readers, no file twice: what one has read may stay in the memory of
    a host outside.
    """
    rounds = max(1, min(len(paths) // 3, 3))
    count = max(1, min(len(paths) // (3 * rounds), 5))
    parts = [paths[i * count : (i + 1) * count] for i in range(3 * rounds)]
    return [parts[3 * i : 3 * i + 3] for i in range(rounds)]


def measure_cold(paths: list[str], layout: str) -> list[dict]:
    """From the disk: files that are not mapped yet and were dropped from the page cache, other ones for each reader.

    On a virtual machine the host may still hold what was written lately: then these are no rates of a disk.
    """
    readers: dict[str, Callable[[list[str]], float]] = {
        "sequential read": lambda part: read_bytes_per_s(part, size_of(part)),
        "loader, shuffled, 2 workers": lambda part: (
            SAMPLE_BYTES * loader_rate(LatentShards(part), 2, len(part) * SHARD // BATCH, raw=True)
        ),
        "one file opened per sample": lambda part: SAMPLE_BYTES * per_sample_rate(FilePerSample(part), 3),
    }
    found: dict[str, list[float]] = {name: [] for name in readers}
    forget(paths)
    for turn, parts in enumerate(cold_rounds(paths)):
        for place, part in enumerate(parts):  # each reader comes first in one round
            name = list(readers)[(turn + place) % 3]
            found[name].append(readers[name](part) / 1e9)
            gc.collect()  # mapped pages stay in the cache
    return [row(f"{layout}: cold, {name}", values, "GB/s") for name, values in found.items()]


def held_bytes(paths: list[str]) -> float:
    """Memory of an open loader after three batches, less its slots for batches, per sample.

    Python's and NumPy's as tracemalloc counts it, and torch's as its new storages (NumPy memory that torch sees too
    counts twice); mapped files are not memory.
    """
    gc.collect()
    # what is there stays until the end, so that its addresses are not used again
    before = torch_storages()
    tracemalloc.start()
    shards = LatentShards(paths)
    batches = LatentLoader(shards, BATCH, 0, num_workers=0).raw()
    for _ in islice(batches, 3):
        pass
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    held += sum(storage.nbytes() for address, storage in torch_storages().items() if address not in before)
    slots = 2 * sum(value.nbytes for value in shards.slot(BATCH, features=False).values())
    return (held - slots) / len(shards)


def torch_storages() -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors on the CPU by address, those left out that look into mapped shards."""
    from harness.support import tensors_with_memory  # of tests/, which data.py puts on the path

    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    mapped = [tuple(int(end, 16) for end in words[0].split("-")) for words in maps]
    storages = [tensor.untyped_storage() for tensor in tensors_with_memory() if tensor.device.type == "cpu"]
    return {
        s.data_ptr(): s
        for s in storages
        if not any(s.data_ptr() < stop and start < s.data_ptr() + s.nbytes() for start, stop in mapped)
    }
