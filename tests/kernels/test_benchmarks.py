"""The kernel benchmark's rows and its timers; no test asserts a time."""

import importlib.util
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
    command += ["--modes", "fp32"]
    command += ["--backend", "aot_eager", "--seconds", "0.02", "--out", str(tmp_path)]
    command += ["--json", str(tmp_path / "rows.json")]
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


def test_readme_shows_the_stored_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("kernel_benchmark", ROOT / "benchmarks" / "kernels.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernel_benchmark", benchmark)
    spec.loader.exec_module(benchmark)
    from readme import KERNELS_README, section

    rows = json.loads((ROOT / "benchmarks" / "results" / "kernels-cpu.json").read_text())
    assert section(KERNELS_README, "kernels-cpu")[1].strip() == benchmark.markdown(rows)


def test_timing_is_median_and_quartiles(timing):
    timed = timing.Timing.of([float(value) for value in range(9)][::-1])
    assert (timed.low, timed.median, timed.high) == (2.0, 4.0, 6.0)
    assert timed.spread == 1.0


class StandInDriver:
    """As much of Triton's driver as a backlog needs; notes what is queued."""

    def __init__(self, queue):
        self.queue = queue

    def clear_cache(self, cache):
        self.queue.append("flush")


def test_backlog_waits_on_the_device_after_every_flush_and_then_leaves_the_driver_alone(timing, monkeypatch):
    runtime = pytest.importorskip("triton.runtime", reason="needs Triton: pip install triton")
    queue = []
    driver = StandInDriver(queue)
    monkeypatch.setattr(runtime, "driver", type("Config", (), {"active": driver}))
    monkeypatch.setattr(timing, "cycles_per_second", lambda: 2e9)
    monkeypatch.setattr(timing.torch.cuda, "_sleep", queue.append)
    with timing.backlog(1e-3):
        driver.clear_cache(None)
    driver.clear_cache(None)
    assert queue == ["flush", 2_000_000, "flush"]


@pytest.mark.gpu
def test_device_time_of_a_copy_is_below_what_any_device_reaches(timing):
    import torch

    source = torch.ones(1 << 26, device="cuda")
    timed = timing.device_time(lambda: source.clone())
    # 512 MiB moved; 20 TB/s is more than any device has
    assert timed.low > 2**29 / 20e12 * 1e3
