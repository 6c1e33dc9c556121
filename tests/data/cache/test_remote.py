"""Remote shards arrive in a local folder once."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import torch
from harness.tiny_run import tiny_config, with_data, write_data

from sfd_fast.data.cache.remote import fetch_folder
from sfd_fast.data.cache.shards import write_json, write_shard
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.files.digest import file_digest
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


class Bucket:
    """A cache in memory, and what the storage tells of its files: their ETags, their times, or their sizes alone."""

    def __init__(self, folder, monkeypatch, tells):
        self.folder, self.fetched = folder, []
        memory = fsspec.get_filesystem_class("memory")
        listed, asked, get_file = memory.ls, memory.info, memory.get_file

        def seen(system, row):
            if row["type"] != "file":
                return row
            more = {
                "ETag": {"ETag": hashlib.md5(system.cat_file(row["name"])).hexdigest(), "LastModified": time.time()},
                "time": {"LastModified": row["created"]}, "size": {},
            }  # fmt: skip
            return {key: row[key] for key in ("name", "size", "type")} | more[tells]

        def get(system, remote_path, local_path, **options):
            self.fetched.append(Path(remote_path).name)
            get_file(system, remote_path, local_path, **options)

        monkeypatch.setattr(memory, "ls", lambda s, path, **more: [seen(s, r) for r in listed(s, path, detail=True)])
        monkeypatch.setattr(memory, "info", lambda s, path, **more: seen(s, asked(s, path)))
        monkeypatch.setattr(memory, "get_file", get)
        self.system = fsspec.filesystem("memory")
        self.upload()

    def upload(self, *names):
        for path in self.folder.iterdir():
            if path.name in names or not names:
                self.system.put(str(path), f"/told/{path.name}")

    def fetch(self, local):
        """(local folder, names of the files that were copied)."""
        self.fetched.clear()
        return fetch_folder("memory://told", local), sorted(self.fetched)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    yield lambda folder, tells: Bucket(folder, monkeypatch, tells)
    fsspec.filesystem("memory").rm("/told", recursive=True)


def released(folder):
    for name in "ab":
        write_shard(folder / f"{name}.safetensors", {"latents": torch.zeros(2, 2, 3, 3), "labels": torch.arange(2)})
    LatentStatistics.identity(2, 0).save(folder)
    return folder


@pytest.mark.parametrize("tells", ["ETag", "time", "size"])
def test_a_shard_of_the_same_size_with_other_content_is_copied_again(bucket, tmp_path, tells):
    source = released(tmp_path / "source")
    remote = bucket(source, tells)
    folder, first = remote.fetch(tmp_path / "local")
    size = (source / "b.safetensors").stat().st_size
    write_shard(source / "b.safetensors", {"latents": torch.ones(2, 2, 3, 3), "labels": torch.arange(2)})
    assert (source / "b.safetensors").stat().st_size == size
    remote.upload("b.safetensors")
    # a storage that tells sizes alone cannot tell which file changed: all are copied
    assert remote.fetch(tmp_path / "local")[1] == (first if tells == "size" else ["b.safetensors"])
    assert LatentShards(folder).gather(torch.tensor([3]), torch.tensor([False]))["texture"].eq(1).all()


def test_an_etag_that_is_the_same_counts_more_than_a_new_time(bucket, tmp_path):
    remote = bucket(released(tmp_path / "source"), "ETag")
    remote.fetch(tmp_path / "local")
    remote.upload()
    assert remote.fetch(tmp_path / "local")[1] == []


def test_shards_of_a_manifest_are_told_by_its_checksums(bucket, tmp_path):
    """Even where the storage tells sizes alone: only what the new manifest lists otherwise is copied."""
    source = released(tmp_path / "source")

    def list_shards():
        rows = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path), "count": 2}
            for path in source.glob("*.safetensors")
        }
        write_json(source / "manifest.json", {"format": 1, "complete": True, "shards": rows})

    list_shards()
    remote = bucket(source, "size")
    folder, _ = remote.fetch(tmp_path / "local")
    kept = ["latents_stats.pt", "manifest.json"]
    assert remote.fetch(tmp_path / "local")[1] == kept
    write_shard(source / "b.safetensors", {"latents": torch.ones(2, 2, 3, 3), "labels": torch.arange(2)})
    list_shards()
    remote.upload()
    assert remote.fetch(tmp_path / "local")[1] == sorted([*kept, "b.safetensors"])
    assert LatentShards(folder).gather(torch.tensor([3]), torch.tensor([False]))["texture"].eq(1).all()
    (source / "a.safetensors").write_bytes(b"x" * (source / "a.safetensors").stat().st_size)
    remote.upload("a.safetensors")
    (folder / "a.safetensors").unlink()
    with pytest.raises(ValueError, match="told/a.safetensors is not what its manifest lists"):
        remote.fetch(tmp_path / "local")
    assert not (folder / "a.safetensors").exists()


def test_shards_that_are_gone_there_go_here(bucket, tmp_path):
    remote = bucket(released(tmp_path / "source"), "ETag")
    folder, _ = remote.fetch(tmp_path / "local")
    remote.system.rm("/told/a.safetensors")
    remote.fetch(tmp_path / "local")
    assert [path.name for path in folder.glob("*.safetensors")] == ["b.safetensors"]


@pytest.mark.parametrize("content", ["", "[1]", '{"a.safetensors": 3}', "{" * 9])
def test_damaged_notes_of_the_local_copy_cost_another_copy(bucket, tmp_path, content):
    remote = bucket(released(tmp_path / "source"), "ETag")
    folder, first = remote.fetch(tmp_path / "local")
    folder.with_suffix(".json").write_text(content)
    assert remote.fetch(tmp_path / "local")[1] == first
    assert len(LatentShards(folder)) == 4
