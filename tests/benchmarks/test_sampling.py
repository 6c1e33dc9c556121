"""The rows of the sampling benchmark: bars that can fail, and none that vanish; no test asserts a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from harness.fields import curved, start_state, tight_states

from sfd_fast.config import SamplerConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sampling_accuracy

    monkeypatch.setattr(sampling_accuracy, "STEPS", (3, 6, 12, 24, 48))
    monkeypatch.setattr(sampling_accuracy, "RTOLS", (0.1, 1e-3))
    return sampling_accuracy


def problem(bench):
    x0 = start_state(dtype=torch.float32)
    return bench.Problem("known", curved, x0, tight_states(x0, 0.3)[-1], 0.3, 1)


def test_without_a_trained_model_its_bars_do_not_hold(bench, tmp_path):
    rows = bench.accuracy_rows(tmp_path / "model", tmp_path / "golden", tmp_path / "plot.png")
    assert len(rows) == 4
    for row in rows:
        assert row["bar"] is not None and row["holds"] is False and row["value"] is None
        assert "no trained model in" in row["note"] and "make demo" in row["note"]


def test_the_default_is_compared_with_every_solver(bench, tmp_path):
    case = problem(bench)
    rows, curves, wanted = bench.accuracy(case, True)
    assert set(curves) == {"euler", "midpoint", "heun", "ab2", "abm3", "rk4", "dopri5"}
    values = {row["name"].removeprefix("known: "): row for row in rows}
    share = values[bench.SHARE]
    default = values["abm3 for that error"]["value"]
    assert share["value"] == default / 249 and share["bar"] == 0.25 and share["holds"] == (share["value"] <= 0.25)
    others = [values[f"{s} for that error"]["value"] for s in curves if f"{s} for that error" in values and s != "abm3"]
    (fewest,) = [row for name, row in values.items() if name.startswith(bench.FEWEST)]
    assert fewest["value"] == default / min(others) and fewest["holds"] == (default <= min(others))
    bench.plot([(case, curves, wanted)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_fewest_evaluations_are_exact_to_one_step(bench):
    case = problem(bench)
    points = bench.curve(case, "heun")
    wanted = case.error(SamplerConfig(solver="heun", num_inference_steps=9))
    assert bench.fewest_evaluations(case, "heun", points, wanted) == 18
    assert bench.fewest_evaluations(case, "heun", points, 0.0) is None


def test_evaluations_of_dopri5_are_counted(bench):
    evaluations, error = problem(bench).counted(SamplerConfig(solver="dopri5"))
    assert evaluations > 3 * 8
    assert 0 < error < 1e-2


@pytest.mark.parametrize("value, holds", [(None, False), (1.01, False), (1.0, True)])
def test_a_bar_holds_only_for_a_measured_value_at_most_it(bench, value, holds):
    assert bench.checked("name", value, 1.0, True)["holds"] is holds
    assert bench.checked("name", value, 1.0, False)["bar"] is None


def test_rows_are_written_to_the_results_and_to_the_given_file(bench, tmp_path, monkeypatch, capsys):
    import json
    import sys

    import sampling

    monkeypatch.setattr(sampling, "RESULTS", tmp_path / "results")
    old = [
        {"part": part, "name": part, "value": 1.0, "unit": "1", "bar": None, "holds": None} for part in sampling.PARTS
    ]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "sampling.json").write_text(json.dumps(old))
    metric = {"name": "m", "value": np.float64(0.5), "unit": "1", "bar": np.float32(1), "holds": np.float64(0.5) <= 1}
    monkeypatch.setattr(sampling, "metrics_rows", lambda: [metric])
    arguments = [
        "--parts",
        "accuracy",
        "metrics",
        "--model",
        str(tmp_path / "none"),
        "--golden",
        str(tmp_path / "none"),
    ]
    monkeypatch.setattr(sys, "argv", ["sampling.py", *arguments, "--json", str(tmp_path / "given.json")])
    sampling.main()
    written = json.loads((tmp_path / "results" / "sampling.json").read_text())
    assert json.loads((tmp_path / "given.json").read_text()) == written
    assert [r["part"] for r in written] == ["accuracy"] * 4 + ["metrics", "speed"]
    for r in written:
        assert {"name", "value", "unit", "bar", "holds"} <= r.keys()
    assert written[4]["holds"] is True and written[4]["bar"] == 1
    assert "DOES NOT HOLD (not measured" in capsys.readouterr().out
