"""A file appears whole or not at all, and a full disk is an error that names it."""

import contextlib
import os
import resource

import pytest
import torch

from sfd_fast.data.cache.shards import write_json, write_shard
from sfd_fast.data.images.screening import Finding, Journals
from sfd_fast.data.images.sources import Scan
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.files import atomic
from sfd_fast.files.atomic import AtomicFile, create_once, sweep, write_atomically


@contextlib.contextmanager
def full_disk(left: int):
    """Files of this process cannot grow beyond `left` bytes (the kernel's limit; Python ignores its signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "a.safetensors": lambda path: write_shard(path, {"labels": torch.arange(4096)}),
    "manifest.json": lambda path: write_json(path, {"x": list(range(1000))}),
    "latents_stats.pt": lambda path: LatentStatistics.identity(64, 1).save(path.parent),
    "picture.png": lambda path: write_atomically(path, bytes(4096)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_keeps_what_was_there(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"old")
    with full_disk(600), pytest.raises(OSError, match=f"cannot write {path}.*File too large"):
        WRITERS[name](path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("step", ["pwrite", "fsync", "replace", "close"])
def test_whatever_step_fails_no_temporary_file_is_left(tmp_path, monkeypatch, step):
    real = getattr(os, step)

    def fail(*arguments):
        if step == "close":
            real(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, step, fail)
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'a'}: No space left on device"):
        write_atomically(tmp_path / "a", b"content")
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


def test_a_write_that_the_disk_takes_in_parts_is_completed(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(atomic.os, "pwrite", lambda number, view, offset: real(number, view[:3], offset))
    write_atomically(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_an_exception_inside_the_block_keeps_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), AtomicFile(tmp_path / "a") as file:
        file.write(b"new")
        raise RuntimeError("stop")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'file' / 'a'}: "):
        write_atomically(tmp_path / "file" / "a", b"")


def test_the_journal_of_a_screening_is_named_where_the_disk_is_full(tmp_path):
    journals = Journals(tmp_path, Scan("folder", "x", ["a"]))
    with full_disk(10), pytest.raises(OSError, match=r"cannot write .*\.writing-screened.*: File too large"):
        journals.add(0, {0: Finding(width=1)})


def test_sweeping_removes_temporary_files_alone(tmp_path):
    for name in (".writing-12-1-a.safetensors", ".writing-1-1-manifest.json", "b.tmp", ".hidden", "a.safetensors"):
        (tmp_path / name).write_bytes(b"")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.safetensors", "b.tmp"]


def test_a_file_is_created_by_one_only(tmp_path):
    path = tmp_path / "run.json"
    assert create_once(path, b"first")
    assert not create_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_created_by_one_only_where_the_disk_has_no_hard_links(tmp_path, monkeypatch):
    def refused(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(atomic.os, "link", refused)
    path = tmp_path / "run.json"
    assert create_once(path, b"first")
    assert not create_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
