"""Files of generated images: whole or absent, bounded queues, npz that numpy reads."""

import time

import numpy as np
import pytest

from sfd_fast.sampling import image_writer


def test_the_writer_bounds_its_queue_and_finishes_what_it_was_given():
    running, most, done = [], [], []

    def job():
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        running.pop()
        done.append(1)

    with image_writer.AsyncWriter(2, max_waiting=3) as writer:
        for _ in range(20):
            writer.submit(job)
    assert len(done) == 20
    assert max(most) <= 2


def test_a_failure_of_a_thread_is_raised_when_the_writer_is_left():
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left.*what is complete is"), image_writer.AsyncWriter(1, 2) as writer:
        writer.submit(fail)


def test_npz_gathers_parts_in_the_given_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    parts = [tmp_path / f"{start}.npy" for start in (0, 3, 6)]
    for start, part in zip((0, 3, 6), parts):
        image_writer.write_array(part, images[start : start + 3])
    order = np.array([6, 0, 3, 2, 5, 1, 4])
    image_writer.write_npz(tmp_path / "a.npz", parts, order, 3, {"arr_1": order % 2})
    with np.load(tmp_path / "a.npz") as stored:
        assert np.array_equal(stored["arr_0"], images[order])
        assert np.array_equal(stored["arr_1"], order % 2)
