"""Checkpoint folders of several ranks: what a rank that fails leaves behind. (Resuming: test_training_resume.py)"""

import shutil
import threading
import time

import pytest

from sfd_fast.training.checkpoints import Checkpoints


def write_part(folder, rank):
    (folder / f"state-{rank:05d}.safetensors").write_bytes(b"part")


def test_a_rank_whose_folder_is_gone_reports_its_own_error(tmp_path):
    """Not even the mark for rank 0 can be written; the first error is the one to read."""
    checkpoints = Checkpoints(tmp_path, keep=1, rank=1, world_size=2)

    def write(folder):
        shutil.rmtree(folder)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="step 3 could not be written.*Input/output error"):
        checkpoints.save(3, write, {})


def test_a_rank_that_fails_tells_rank_0_at_once_and_makes_room(tmp_path):
    leader = Checkpoints(tmp_path, keep=1, rank=0, world_size=2, timeout_s=60)
    other = Checkpoints(tmp_path, keep=1, rank=1, world_size=2, timeout_s=60)

    def fail(folder):
        write_part(folder, 1)
        raise OSError(28, "No space left on device")

    start = time.monotonic()
    leader.save(5, lambda folder: write_part(folder, 0), {}, background=True)
    with pytest.raises(OSError, match="No space left"):
        other.save(5, fail, {})
    with pytest.raises(OSError, match="rank 1 could not write its part.*there is none yet"):
        leader.wait()
    assert time.monotonic() - start < 10
    assert leader.latest() is None and not list(tmp_path.glob("*/state-*"))


def test_rank_0_publishes_when_all_parts_are_there(tmp_path):
    ranks = [Checkpoints(tmp_path, keep=1, rank=rank, world_size=3, timeout_s=60) for rank in range(3)]
    started = threading.Event()

    def late(folder):
        started.wait()
        write_part(folder, 2)

    for rank, checkpoints in enumerate(ranks[:2]):
        checkpoints.save(7, lambda folder, rank=rank: write_part(folder, rank), {}, background=True)
    ranks[2].save(7, late, {}, background=True)
    assert ranks[0].latest() is None
    started.set()
    for checkpoints in ranks:
        checkpoints.wait()
    assert sorted(p.name for p in ranks[0].latest().iterdir()) == [
        "state-00000.safetensors", "state-00001.safetensors", "state-00002.safetensors", "state.json",
    ]  # fmt: skip


def test_only_rank_0_measures_every_file(tmp_path):
    ranks = [Checkpoints(tmp_path, keep=1, rank=rank, world_size=2, timeout_s=60) for rank in (0, 1)]
    for rank, checkpoints in enumerate(ranks):
        checkpoints.save(1, lambda folder, rank=rank: write_part(folder, rank), {}, background=True)
    for checkpoints in ranks:
        checkpoints.wait()
    (tmp_path / "00000001" / "state-00001.safetensors").write_bytes(b"cut")
    assert ranks[1].latest() == tmp_path / "00000001"
    with pytest.raises(ValueError, match="damaged .state-00001.safetensors has 3 bytes instead of 4"):
        ranks[0].latest()
