"""Checkpoint folders: written by several ranks, damaged, swapped, beside what is not ours. (Resuming: test_resume)"""

import hashlib
import json
import shutil
import threading
import time

import pytest

from sfd_fast.training.checkpoints import Checkpoints
from sfd_fast.training.export import find_checkpoint

PART = "state-00000.safetensors"


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


def test_each_rank_reads_the_files_of_its_share(tmp_path):
    ranks = [Checkpoints(tmp_path, keep=1, rank=rank, world_size=2, timeout_s=60) for rank in (0, 1)]
    for rank, checkpoints in enumerate(ranks):
        checkpoints.save(1, lambda folder, rank=rank: write_part(folder, rank), {}, background=True)
    for checkpoints in ranks:
        checkpoints.wait()
    (tmp_path / "00000001" / "state-00001.safetensors").write_bytes(b"cut")
    assert ranks[0].latest() == tmp_path / "00000001"
    with pytest.raises(ValueError, match="damaged .state-00001.safetensors has 3 bytes instead of 4"):
        ranks[1].latest()
    alone = Checkpoints(tmp_path, keep=1)
    with pytest.raises(ValueError, match="damaged .state-00001.safetensors has 3 bytes instead of 4"):
        alone.latest()


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints of one rank, of steps 4 and 8."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.begin()
    for step in (4, 8):
        checkpoints.save(step, lambda folder, step=step: (folder / PART).write_bytes(bytes([step] * 100)), {"note": 1})
    return checkpoints


def test_a_checkpoint_lists_size_and_sha256_of_its_files(saved):
    files = json.loads((saved.root / "00000008" / "state.json").read_text())["files"]
    assert files == {PART: [100, hashlib.sha256(bytes([8] * 100)).hexdigest()]}


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0, 57, 99])
def test_a_flipped_bit_is_found_and_the_previous_checkpoint_named(saved, position):
    flip(saved.root / "00000008" / PART, position)
    with pytest.raises(ValueError, match="00000008 is damaged .*another SHA-256.*newest intact .* is 00000004"):
        saved.latest()
    saved.verify = False
    assert saved.latest() == saved.root / "00000008"


def test_any_flipped_bit_of_the_state_is_found(saved):
    path = saved.root / "00000008" / "state.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position)
        if json_or_none(path) != json.loads(whole):  # white space between entries means nothing
            with pytest.raises(ValueError, match="00000008 is damaged .*newest intact checkpoint is 00000004"):
                saved.latest()
        path.write_bytes(whole)
    assert saved.latest() == saved.root / "00000008"


def json_or_none(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_files_and_folders_swapped_between_checkpoints_are_found(saved):
    first, second = (saved.root / name for name in ("00000004", "00000008"))
    kept = (second / PART).read_bytes()
    (second / PART).write_bytes((first / PART).read_bytes())
    with pytest.raises(ValueError, match="has another SHA-256 than when it was saved: a bit flipped, or it is of an"):
        saved.latest()
    (second / PART).write_bytes(kept)
    first.rename(saved.root / "aside")
    second.rename(first)
    (saved.root / "aside").rename(second)
    with pytest.raises(ValueError, match="is of step 4: it belongs to another checkpoint.*intact checkpoint is none"):
        saved.latest()


def test_a_missing_pointer_is_an_error_that_names_what_is_there(saved):
    (saved.root / "latest").unlink()
    with pytest.raises(ValueError, match="latest is missing.*intact checkpoints are there: 00000008, 00000004; write"):
        saved.latest()
    with pytest.raises(ValueError, match="latest holds '../elsewhere'; it must hold the name of a checkpoint"):
        (saved.root / "latest").write_text("../elsewhere")
        saved.latest()


def test_before_the_first_checkpoint_the_pointer_says_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.latest() is None
    checkpoints.begin()
    assert (checkpoints.root / "latest").read_text() == "none" and checkpoints.latest() is None
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        find_checkpoint(tmp_path)


def test_folders_that_are_not_ours_are_left_alone(saved):
    for name in ("2024", "00000012", "00000002"):
        (saved.root / name).mkdir()
        (saved.root / name / "thesis.txt").write_text("mine")
    (saved.root / "00000002" / "state.json").write_text('{"step": 2}')
    saved.begin()
    saved.save(10, lambda folder: (folder / PART).write_bytes(b"x"), {})
    assert saved.steps() == [8, 10]
    with pytest.raises(OSError, match="step 12 could not be written .*00000012 is there already and is no checkpoint"):
        saved.save(12, lambda folder: (folder / PART).write_bytes(b"x"), {})
    assert all((saved.root / name / "thesis.txt").read_text() == "mine" for name in ("2024", "00000012", "00000002"))
    assert saved.latest() == saved.root / "00000010"


MALFORMED = {
    "deep": "[" * 100_000,
    "a list": "[1, 2]",
    "no JSON": "\x00\x01",
    "no files": '{"step": 8, "digest": ""}',
    "files as a list": '{"step": 8, "digest": "", "files": [1]}',
    "a step that is text": '{"step": "8", "digest": "", "files": {}}',
    "a step that is true": '{"step": true, "digest": "", "files": {}}',
    "a file elsewhere": '{"step": 8, "digest": "", "files": {"../../x": [1, ""]}}',
    "a size that is text": '{"step": 8, "digest": "", "files": {"x": ["1", ""]}}',
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("verify", [True, False])
def test_a_malformed_state_is_one_line_with_its_name(saved, kind, verify):
    (saved.root / "00000008" / "state.json").write_text(MALFORMED[kind])
    saved.verify = verify
    with pytest.raises(ValueError, match=r"00000008/state.json.*newest intact checkpoint is 00000004") as error:
        saved.latest()
    assert "\n" not in str(error.value)


def test_keeping_none_away_keeps_all(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=0)
    for step in range(1, 6):
        checkpoints.save(step, lambda folder: write_part(folder, 0), {})
    assert checkpoints.steps() == [1, 2, 3, 4, 5]
