"""Remote shards arrive in a local folder once."""

import fsspec
import pytest
import torch

from sfd_fast.data.latents import LatentShards
from sfd_fast.data.remote import fetch_folder
from sfd_fast.data.shards import write_shard
from sfd_fast.data.statistics import LatentStatistics


@pytest.fixture
def remote(tmp_path):
    """A cache on fsspec's in-memory file system."""
    filesystem = fsspec.filesystem("memory")
    source = tmp_path / "source"
    tensors = {"latents": torch.randn(4, 2, 3, 3), "labels": torch.arange(4)}
    write_shard(source / "a.safetensors", tensors)
    LatentStatistics.identity(2, 0).save(source)
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
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert fetch_folder(address, tmp_path / "local") == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert set(before) == {"a.safetensors", "latents_stats.pt"}


def test_a_remote_address_needs_a_local_folder(remote):
    with pytest.raises(ValueError, match="name a local folder"):
        LatentShards(remote[0])
