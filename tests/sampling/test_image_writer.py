"""Files of generated images: whole or absent, bounded queues, npz that numpy reads."""

import time

import numpy as np
import pytest

from sfd_fast.sampling import image_writer as image_files


def test_the_writer_bounds_its_queue_and_finishes_what_it_was_given():
    running, most, done = [], [], []

    def job():
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        running.pop()
        done.append(1)

    with image_files.AsyncWriter(2, max_waiting=3) as writer:
        for _ in range(20):
            writer.submit(job)
    assert len(done) == 20
    assert max(most) <= 2


def test_a_failure_of_a_thread_is_raised_when_the_writer_is_left():
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left.*what is complete is"), image_files.AsyncWriter(1, 2) as writer:
        writer.submit(fail)


def test_a_file_is_created_by_one_only(tmp_path):
    path = tmp_path / "run.json"
    assert image_files.create_once(path, b"first")
    assert not image_files.create_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_created_by_one_only_where_the_disk_has_no_hard_links(tmp_path, monkeypatch):
    def refused(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(image_files.os, "link", refused)
    path = tmp_path / "run.json"
    assert image_files.create_once(path, b"first")
    assert not image_files.create_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("full")

    with pytest.raises(OSError, match=r"x.npy could not be written \(full\)"):
        image_files.write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]  # what was written gives its room back
    (tmp_path / ".writing-x.npy").write_bytes(b"half")  # as a kill leaves it
    image_files.remove_temporary_files(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_npz_gathers_parts_in_the_given_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    parts = [tmp_path / f"{start}.npy" for start in (0, 3, 6)]
    for start, part in zip((0, 3, 6), parts):
        image_files.write_part(part, images[start : start + 3])
    order = np.array([6, 0, 3, 2, 5, 1, 4])
    image_files.write_npz(tmp_path / "a.npz", parts, order, 3, {"arr_1": order % 2})
    with np.load(tmp_path / "a.npz") as stored:
        assert np.array_equal(stored["arr_0"], images[order])
        assert np.array_equal(stored["arr_1"], order % 2)
