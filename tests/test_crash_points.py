"""A part of the crash points that `make soak` sweeps: whatever a killed process left, the outcome is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent / "harness"


@pytest.mark.parametrize(("part", "every", "at_least"), [("train", 6, 22), ("export", 4, 6), ("sample", 8, 8)])
def test_work_that_was_killed_at_some_file_event_ends_with_the_same_files(tmp_path, part, every, at_least):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(HARNESS / "crash_points.py"), part, str(tmp_path / "work"), str(every)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], done.stderr[-3000:]
    assert found["points"] >= at_least
