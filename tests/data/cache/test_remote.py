"""Remote shards arrive in a local folder once."""

import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
import torch
from harness.tiny_run import tiny_config, with_data, write_data

from sfd_fast.data.cache.remote import fetch_folder
from sfd_fast.data.cache.shards import write_shard
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.training.diffusion import run_train


@pytest.fixture
def remote(tmp_path):
    """A cache on fsspec's in-memory file system."""
    filesystem = fsspec.filesystem("memory")
    source = tmp_path / "source"
    tensors = {"latents": torch.randn(4, 2, 3, 3), "labels": torch.arange(4)}
    write_shard(source / "a.safetensors", tensors)
    LatentStatistics.identity(2, 0).save(source)
    (source / "index").mkdir()
    (source / "index" / "index.safetensors").write_bytes(b"index")
    (source / "notes.txt").write_text("not part of the cache")
    filesystem.put(str(source), "/bucket/cache", recursive=True)
    yield "memory://bucket/cache", tensors
    filesystem.rm("/bucket", recursive=True)


def test_a_remote_cache_reads_like_a_local_one(remote, tmp_path):
    address, tensors = remote
    shards = LatentShards(address, cache_folder=tmp_path / "local")
    out = shards.gather(torch.tensor([3, 0]), torch.tensor([False, False]))
    assert torch.equal(out["texture"], tensors["latents"][[3, 0]])
    assert shards.statistics().texture_channels == 2


def test_files_are_fetched_once(remote, tmp_path):
    address, _ = remote
    folder = fetch_folder(address, tmp_path / "local")


    def times():
        return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}

    before = times()
    assert fetch_folder(address, tmp_path / "local") == folder
    assert times() == before
    assert set(before) == {"a.safetensors", "latents_stats.pt", "index/index.safetensors"}


def test_one_of_many_ranks_fetches(remote, tmp_path, monkeypatch):
    """The lock is held by an open file, so threads stand for the ranks of a node."""
    memory = fsspec.get_filesystem_class("memory")
    get_file, fetched = memory.get_file, []

    def slow(self, remote_path, local_path, **options):
        fetched.append(remote_path)
        time.sleep(0.05)  # long enough for all ranks to want it at once
        get_file(self, remote_path, local_path, **options)

    monkeypatch.setattr(memory, "get_file", slow)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: fetch_folder(remote[0], tmp_path / "local"), range(4)))
    assert len(set(folders)) == 1
    assert len(fetched) == 3


def test_a_run_trains_from_remote_storage(tmp_path):
    filesystem = fsspec.filesystem("memory")
    source = write_data(tmp_path / "source")
    filesystem.put(str(source), "/bucket/latents", recursive=True)
    config = with_data(tiny_config("memory://bucket/latents", tmp_path / "run"), cache_folder=str(tmp_path / "local"))
    try:
        remote = run_train(config, device="cpu", progress=False)
    finally:
        filesystem.rm("/bucket/latents", recursive=True)
    local = run_train(tiny_config(source, tmp_path / "other"), device="cpu", progress=False)
    assert remote.loss == local.loss
    with pytest.raises(ValueError, match=r"memory://bucket/latents is remote: .*data\.cache_folder"):
        run_train(with_data(config, cache_folder=""), device="cpu", progress=False)


def test_a_remote_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="bucket/nowhere"):
        LatentShards("memory://bucket/nowhere", cache_folder=tmp_path)


def test_a_file_address_is_read_in_place(tmp_path):
    source = write_data(tmp_path / "source")
    assert LatentShards(f"file://{source}").folder == source


def test_a_remote_address_needs_a_local_folder(remote):
    with pytest.raises(ValueError, match="name a local folder"):
        LatentShards(remote[0])
