"""The timers: windows by a false clock, busy time of overlapping spans, shares of what ran on the device."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_wall_time_is_that_of_one_step_with_the_wait_for_the_device():
    from timing import wall_time

    now, waits = [0.0], []

    def step():
        now[0] += 0.010

    def wait():  # the device ends 5 ms after the host has launched a window
        waits.append(now[0])
        now[0] += 0.005

    found = wall_time(step, wait, num_steps=5, num_windows=3, clock=lambda: now[0])
    assert found.median == pytest.approx(11.0) and len(waits) == 4  # one before the first window


def test_busy_time_counts_what_overlaps_once():
    from timing import busy_ms

    assert busy_ms([(0, 1000), (500, 2000), (600, 700), (3000, 4000)]) == pytest.approx(3.0)
    assert busy_ms([]) == 0.0


def test_shares_are_of_the_devices_time_by_the_operator_that_launched():
    """On CUDA a kernel's row carries no operator's name, and an operator's own device time is that of its kernels."""
    from timing import shares_of

    rows = [  # name, on the device, an operator, its own device time
        ("aten::mm", False, True, 60.0), ("aten::add", False, True, 10.0),
        ("nvjet_tst_128x256", True, False, 60.0), ("vectorized_elementwise_kernel", True, False, 10.0),
        ("sfd_swiglu", True, False, 30.0),
    ]  # fmt: skip
    assert shares_of(rows, {"products": ("aten::mm",)}) == {"products": pytest.approx(0.6)}
    assert shares_of(rows[2:], {"products": ("aten::mm",)}) == {"products": 0.0}
    assert shares_of([], {"products": ("aten::mm",)}) == {}


def test_a_step_on_a_cpu_is_profiled_by_its_operators():
    from timing import profile_step

    left, right = torch.randn(300, 300), torch.randn(300, 300)
    seen = profile_step(lambda: (left @ right) + 1, "cpu", {"products": ("aten::mm",), "none": ("aten::conv",)})
    assert 0.0 < seen.shares["products"] <= 1.0 and seen.shares["none"] == 0.0
    assert seen.busy_ms > 0 and seen.launches == 0
