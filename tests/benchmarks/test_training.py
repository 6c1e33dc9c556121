"""Rows of the training benchmark: nothing divides by a share of zero, and the manners give one step each."""

import weakref
from pathlib import Path

import pytest
from harness.tiny_run import MODEL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training

    return training


def timing(milliseconds):
    from timing import Timing

    return Timing(milliseconds, milliseconds, milliseconds)


def test_the_cap_is_eager_over_the_products_in_the_busy_time(bench):
    times = {
        "ours": (timing(10.0), {"busy_ms": 8.0, "products": 0.5}), "eager": (timing(20.0), {"products": 0.2})
    }  # fmt: skip
    found = bench.rows_of("XL", 4, times, {"eager": 3.0})
    rows = {row["name"]: row["value"] for row in found}
    eager = next(row for row in found if row["name"] == "XL: eager")
    assert eager["ratio_to_ours"] == 2.0 and eager["bar"] == 3.0 and not eager["holds"]
    assert rows["XL: cap over eager that they set"] == pytest.approx(20.0 / (0.5 * 8.0))
    assert rows["XL: share of matrix products and attention in ours"] == 0.5


def test_a_share_of_zero_sets_no_cap(bench):
    times = {"ours": (timing(10.0), {"products": 0.0}), "eager": (timing(20.0), {"products": 0.0})}
    names = [row["name"] for row in bench.rows_of("XL", 4, times, {"eager": 3.0})]
    assert not any("cap" in name for name in names)


def test_one_manner_is_in_memory_at_a_time(bench, monkeypatch):
    config = bench.settings(MODEL)
    batch = bench.batch_of(config, 2, "cpu")
    built = []
    build = bench.network_of

    def watched(*arguments):
        assert not any(network() is not None for network in built)  # the manners before have gone
        found = build(*arguments)
        built.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(bench, "network_of", watched)
    for manner in ("ours", "graphed", "eager"):
        with bench.step_in(manner, config, batch, "cpu", False) as step:
            step()
            del step
    assert len(built) == 3
