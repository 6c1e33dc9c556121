"""What the benchmark of data measures is what it says: memory that is held, and readers that do not warm each other."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from data_loader import cold_rounds, held_bytes, measure_loader, torch_storages, write_cache  # noqa: E402

from sfd_fast.data.cache.shards import map_tensors, read_header, write_shard  # noqa: E402
from sfd_fast.data.load.latents import LatentShards  # noqa: E402


@pytest.mark.parametrize("count", [3, 4, 10, 45])
def test_readers_of_a_cold_disk_share_no_file(count):
    rounds = cold_rounds([f"{i}" for i in range(count)])
    parts = [part for parts in rounds for part in parts]
    assert len({path for part in parts for path in part}) == sum(map(len, parts)) > 0
    assert len({len(part) for part in parts}) == 1 and len(parts) == 3 * len(rounds)


def test_storages_of_torch_are_counted_once_and_mapped_files_not_at_all(tmp_path):
    before = torch_storages()
    kept = torch.zeros(1000)
    views = [kept[1:], kept.view(10, 100), kept.numpy()]
    write_shard(tmp_path / "a.safetensors", {"labels": torch.arange(5000)})
    mapped = map_tensors(tmp_path / "a.safetensors", read_header(tmp_path / "a.safetensors"))
    new = {address: storage.nbytes() for address, storage in torch_storages().items() if address not in before}
    assert new == {kept.data_ptr(): 4000}
    del views, mapped


@pytest.fixture
def small(monkeypatch):
    """Latents of 4 x 4 instead of 16 x 16."""
    monkeypatch.setattr("data_loader.SHAPES", {"latents": (32, 4, 4), "latents_sv": (16, 4, 4)})


def test_held_memory_counts_torch_tensors_and_leaves_slots_out(tmp_path, monkeypatch, small):
    paths = write_cache(tmp_path / "cache", 0, write_shard)
    held_bytes(paths)  # what the first call alone allocates, in a set of 1024 samples
    plain = held_bytes(paths)

    class WithTable(LatentShards):
        """A shard set that holds 100 bytes for each sample in a tensor."""

        def __init__(self, given):
            super().__init__(given)
            self.table = torch.zeros(len(self) * 100, dtype=torch.uint8)

    monkeypatch.setattr("data_loader.LatentShards", WithTable)
    slot = sum(value.nbytes for value in LatentShards(paths).slot(256, features=False).values()) / 1024
    assert held_bytes(paths) - plain == pytest.approx(100, abs=20)
    assert plain < slot, "slots were counted"


def test_both_layouts_are_measured_and_the_bars_are_on_raw_batches_without_workers(tmp_path, monkeypatch, small):
    monkeypatch.setattr("data_loader.ROUNDS", 1)
    monkeypatch.setattr("data_loader.steady_memory", lambda: None)  # it would stay so for all tests
    monkeypatch.setattr("data_loader.data_loader_rate", lambda *_: 1.0)  # forks
    rows = measure_loader(tmp_path, 0.02)
    barred = {row["name"] for row in rows if row["bar"] is not None and row["unit"] == "x"}
    name = "ours: loader, raw, 0 workers, over"
    assert barred == {f"{name} one file per sample", f"{name} a sequential read"}
    released = {row["name"]: row["value"] for row in rows if row["name"].startswith("released layout")}
    assert released["released layout: loader, raw, 0 workers, over a sequential read"] > 0
    assert not list(tmp_path.iterdir())
