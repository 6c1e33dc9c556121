"""The kernel benchmark's rows and its timers; no test asserts a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMISED = {
    "operator", "pass", "dtype", "shape", "reference_ms", "compile_ms", "ours_ms", "copy_ms", "host_us"
}  # fmt: skip


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import timing

    return timing


def test_benchmark_writes_the_promised_rows_for_every_pass(tmp_path):
    command = [sys.executable, "benchmarks/kernels.py", "--ops", "swiglu", "noise_latents", "--sizes", "tiny"]
    command += ["--seconds", "0.02", "--json", str(tmp_path / "rows.json"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    passes = [(row["operator"], row["pass"]) for row in rows]
    assert passes == [("noise_latents", "forward"), *[("swiglu", p) for p in ("forward", "backward", "both")]]
    for row in rows:
        assert row.keys() >= PROMISED
        assert all(row[key] > 0 for key in PROMISED if key.endswith(("_ms", "_us")) and row["pass"] != "backward")
    assert (tmp_path / "kernels-cpu.csv").read_text().count("\n") == 5


def test_interleave_runs_every_step_with_the_result_of_the_one_before(timing):
    seen = []
    timings, canary = timing.interleave(
        {"a": (lambda: 3, seen.append), "b": (lambda: 5,)}, seconds=0.0, min_rounds=2, max_rounds=2
    )
    assert set(seen) == {3}
    assert [len(timings[name]) for name in ("a", "b")] == [2, 1]
    assert canary.median > 0


def test_timing_is_median_and_outer_deciles(timing):
    timed = timing.Timing.of([float(value) for value in range(11)][::-1])
    assert (timed.low, timed.median, timed.high) == (1.0, 5.0, 9.0)
    assert timed.spread == pytest.approx(8 / 5)
