"""gpu_check.py: its rehearsal needs torch, triton and numpy alone and claims nothing; parts that fail are reported."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("condition_silu", "gated_residual_norm_modulate", "qk_norm_rope", "rms_norm_modulate", "swiglu")
ABSENT = """
import sys

# packages for which torch itself looks (pandas, sklearn, tqdm) stay visible
ABSENT = {"diffusers", "jsonargparse", "omegaconf", "deepspeed", "nvidia", "safetensors", "yaml", "PIL", "scipy",
          "matplotlib", "tensorboard", "transformers", "huggingface_hub", "torchdiffeq", "torchmetrics",
          "docstring_parser", "typeshed_client", "datasets"}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return None


sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    return gpu_check


@pytest.mark.timeout(900)
def test_the_rehearsal_runs_every_part_with_torch_triton_and_numpy_alone(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    target = tmp_path / "check.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--rehearse", "--json", str(target)]
    places = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    done = subprocess.run(
        [*command, "--time-scale", "10"], env=os.environ | {"PYTHONPATH": os.pathsep.join(places)}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = json.loads(target.read_text())
    assert found["rehearsal"] is True
    parts = {name: part["rows"] for name, part in found["parts"].items()}
    assert list(parts) == ["facts", "accuracy", "kernels", "sampler", "training"]
    versions = {row["name"]: row["value"] for row in parts["facts"]}
    assert versions["diffusers"] != "absent"  # it is installed here, and was hidden from imports

    checked = {row["name"].split()[0]: row for row in parts["accuracy"] if row["unit"] == "error"}
    if not any("interpreter" in row["name"] for row in parts["accuracy"]):
        assert all(row["holds"] and row["bit_equal"] for row in checked.values())
    assert {*KERNELS, *(f"{name}_backward" for name in KERNELS), "adamw_ema_step"} <= checked.keys()
    timed = {row["name"] for row in parts["kernels"]}
    for name in KERNELS:
        for which in ("forward", "both"):
            ways = {f"{name} {which}: {way}" for way in ("ours", "reference", "compile", "copy")}
            assert ways <= timed
    assert any("attention" in name and "sdpa" in name for name in timed)
    ways = [row["name"].rpartition(": ")[2] for row in parts["sampler"]]
    assert ways[1:] == ["ours, cuda_graph", "ours, eager", "released manner, eager", "ours, compile"]
    manners = [row["name"].rpartition(": ")[2] for row in parts["training"]]
    assert manners == ["ours", "graphed", "deterministic", "eager", "released"]

    for row in (row for name in ("facts", "kernels", "sampler", "training") for row in parts[name]):
        assert not any(isinstance(value, float) for value in row.values()), f"a rehearsal claims {row}"


def test_the_gpu_tests_collect_with_torch_triton_and_numpy_alone(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    places = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(places)}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "tests/kernels/test_triton_gpu.py::test_two_runs_at_full_size_are_bit_equal" in done.stdout
    assert "needs safetensors, which is not installed" in done.stdout


def test_all_parts_together_take_less_than_nine_minutes(bench):
    assert sum(bench.PARTS.values()) <= 530


def write_part(folder, name, text):
    (folder / f"gpu_{name}.py").write_text(f"def run_part(part):\n    part.fact('first', 1)\n    {text}\n")


def test_a_part_that_fails_or_hangs_is_reported_with_its_rows_and_the_others_run(bench, tmp_path, monkeypatch, capsys):
    write_part(tmp_path, "broken", "raise RuntimeError('an illegal memory access was encountered')")
    write_part(tmp_path, "wrong", "part.checked('two runs', False, 'differ')")
    write_part(tmp_path, "endless", "import time; time.sleep(600)")
    write_part(tmp_path, "good", "part.checked('two runs', True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(bench, "PARTS", {"broken": 120, "wrong": 120, "endless": 20, "good": 120})
    target, written, show = tmp_path / "check.json", [], bench.show

    def look_and_show(*arguments):
        written.append(list(json.loads(target.read_text())["parts"]))
        show(*arguments)

    monkeypatch.setattr(bench, "show", look_and_show)
    found = bench.check(list(bench.PARTS), target, rehearse=True)["parts"]
    assert written == [["broken"], ["broken", "wrong"], ["broken", "wrong", "endless"], list(bench.PARTS)]
    assert found["broken"]["status"] == "failed: ended with 1"
    assert "an illegal memory access was encountered" in found["broken"]["output"][-1]
    assert found["wrong"]["status"] == "failed: a row does not hold"
    assert found["endless"]["status"] == "failed: not ready after 20 s"
    assert found["good"]["status"] == "done"
    assert all(part["rows"][0]["name"] == "first" for part in found.values())
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_an_error_within_a_part_is_a_row_and_what_does_not_fit_into_the_time_is_said(bench, tmp_path):
    from gpu_part import Part

    part = Part(tmp_path / "rows.json", 60, rehearse=True)
    part.attempt("first", lambda: 1 / 0)
    part.attempt("second", lambda: part.measured("second", 3.5, "ms", low=3.0, launches=7))
    part.attempt("third", lambda: part.fact("third", 1), seconds=1000)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows == part.rows and rows[0]["holds"] is False and rows[0]["note"] == "ZeroDivisionError: division by zero"
    assert rows[1] == {"name": "second", "value": None, "unit": "ms", "low": None, "launches": 7}
    assert rows[2]["note"].startswith("not run: ") and "1000 s" in rows[2]["note"]


def test_work_that_outlasts_its_part_is_broken_off_and_the_rest_said_to_be_left_out(bench, tmp_path):
    from gpu_part import Part

    part = Part(tmp_path / "rows.json", 1.0, rehearse=True)

    def compile_for_ever():
        part.attempt("within", lambda: time.sleep(60))

    start = time.monotonic()
    part.attempt("first", compile_for_ever)
    part.attempt("second", lambda: part.fact("second", 1))
    assert time.monotonic() - start < 30
    notes = {row["name"]: row["note"] for row in part.rows}
    assert notes["within"] == "not run: not ready when the time of this part was over"
    assert notes["second"].startswith("not run: 0 s were left")
    assert all("holds" not in row for row in part.rows)


def test_gathered_wheels_are_unpacked_once_for_the_parts(bench, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/__init__.py", "found = 7")
    monkeypatch.setattr(bench, "WHEELS", wheels)
    paths = bench.environment(tmp_path / "run", "facts", False)["PYTHONPATH"].split(os.pathsep)
    places = [place for place in paths if (Path(place) / "thing" / "__init__.py").exists()]
    assert len(places) == 1
    monkeypatch.setattr(bench, "WHEELS", tmp_path / "none")
    assert bench.unpacked(tmp_path / "other") == []


def test_without_a_gpu_the_command_says_so(bench, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert bench.main() == 2
    assert "torch sees no CUDA device here; --rehearse" in capsys.readouterr().err
