"""What a long job says, by a clock that the test turns."""

import pytest

from sfd_fast.data import progress as progress_module
from sfd_fast.data.progress import Progress
from sfd_fast.ranks import Ranks


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_rate_and_time_left_are_of_all_ranks_and_said_every_ten_seconds(clock):
    lines = []
    progress = Progress("encoding", 100_000, Ranks(0, 4, 0), lines.append)
    clock[0] += 9
    progress.add(90)
    assert lines == []
    clock[0] += 1
    progress.add(10)
    assert lines == ["encoding: 100/100000 images of rank 0, 40.0 images/s on 4 rank(s), 2:46:30 left"]
    clock[0] += 9.5
    progress.add(100)
    assert len(lines) == 1
    clock[0] += 0.5
    progress.add(200)
    assert lines[1:] == ["encoding: 400/100000 images of rank 0, 80.0 images/s on 4 rank(s), 1:23:00 left"]


def test_the_end_is_said_at_once_and_other_ranks_are_silent(clock):
    lines = []
    for rank in (0, 1):
        progress = Progress("encoding", 8, Ranks(rank, 2, 0), lines.append)
        clock[0] += 2
        progress.add(8)
    assert lines == ["encoding: 8/8 images of rank 0, 8.0 images/s on 2 rank(s), 0:00:00 left"]
