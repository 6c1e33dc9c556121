"""Exact continuation: stopped, pre-empted or killed runs end with the bits of one that never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from harness.tiny_run import checkpoint_tensors, tiny_config, write_data
from safetensors.torch import load_file

from sfd_fast.files.tensors import write_safetensors
from sfd_fast.training import checkpoints as checkpoints_module
from sfd_fast.training.checkpoints import Checkpoints
from sfd_fast.training.diffusion import run_train
from sfd_fast.training.loop import Stop
from sfd_fast.training.run.log import read_rows

HARNESS = Path(__file__).resolve().parents[1] / "harness"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("latents"))


def train(config):
    return run_train(config, device="cpu", progress=False)


def assert_same_end(a, b, step):
    """Every tensor of the last checkpoints and every exported weight, and the counters of the runs."""
    left, right = (checkpoint_tensors(out, step) for out in (a, b))
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []
    folders = [out / "checkpoints" / f"{step:08d}" for out in (a, b)]
    states = [json.loads((folder / "state.json").read_text()) for folder in folders]
    for key in ("step", "skipped", "bad_in_row", "recent_norms", "identity"):
        assert states[0][key] == states[1][key]


def figures(result, kind="train"):
    """Rows without what a clock measured."""
    timed = ("images_per_s", "data_wait", "wall_s", "tflops", "memory_gib")
    return [{k: v for k, v in row.items() if k not in timed} for row in result.metrics if row["kind"] == kind]


def stop_after(monkeypatch, step):
    """Makes the next run believe that it was asked to stop once it has made `step` steps."""
    calls = iter(range(1, 10_000))
    monkeypatch.setattr(Stop, "requested", lambda self: next(calls) == step)


@pytest.mark.parametrize("step", [4, 5, 7])
def test_a_resumed_run_ends_with_the_same_bits_and_rows(tmp_path, data, monkeypatch, step):
    """5 and 7 lie between two log rows: their sums travel with the checkpoint."""
    settings = {"validate_every": 6, "max_steps": 12}
    unbroken = train(tiny_config(data, tmp_path / "a", **settings))
    config = tiny_config(data, tmp_path / "b", **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        stopped = train(config)
    assert stopped.preempted and stopped.step == step and stopped.model is None
    resumed = train(config)
    assert not resumed.preempted
    assert figures(unbroken) == figures(resumed)
    assert figures(unbroken, "validation") == figures(resumed, "validation")
    assert_same_end(tmp_path / "a", tmp_path / "b", 12)


def interrupt(out, action):
    """Runs `action` in a thread as soon as the run in `out` has logged something."""

    def wait_and_act():
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
            time.sleep(0.005)
        action()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


@pytest.mark.parametrize("cause", ["SIGTERM", "SIGUSR1", "STOP"])
def test_a_pre_empted_run_saves_exits_75_and_goes_on_exactly(tmp_path, data, monkeypatch, cause):
    settings = {"max_steps": 80, "log_every": 2, "checkpoint_every": 1000}
    train(tiny_config(data, tmp_path / "a", **settings))
    out = tmp_path / "b"
    config = tiny_config(data, out, **settings)
    monkeypatch.setattr(Stop, "look_every_s", 0.0)
    if cause == "STOP":
        thread = interrupt(out, lambda: (out / "STOP").touch())
    else:
        thread = interrupt(out, lambda: os.kill(os.getpid(), getattr(signal, cause)))
    handler = signal.getsignal(signal.SIGTERM)
    stopped = train(config)
    thread.join()
    assert stopped.exit_code == 75 and 2 <= stopped.step < 80
    assert cause in stopped.metrics[-1]["message"]
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed = train(config)
    assert resumed.exit_code == 0 and resumed.step == 80
    assert_same_end(tmp_path / "a", out, 80)


def test_ten_kills_at_random_moments_end_with_the_same_bits(tmp_path, data):
    """kill -9 while training, reading data, and writing checkpoints, which is most of the time of this run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [data, tmp_path / "b", 10, 0, "max_steps=120", "checkpoint_every=2"]
    command = [sys.executable, HARNESS / "killed_runs.py", *arguments]
    program = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert program.returncode == 0, program.stderr[-2000:]
    assert int(program.stdout.split()[-1]) == 10
    assert_same_end(tmp_path / "b-unbroken", tmp_path / "b", 120)
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("b-unbroken", "b")]
    losses = [[(r["step"], r["loss"]) for r in run if r["kind"] == "train"] for run in rows]
    assert len(losses[0]) == 30 and losses[0] == losses[1]


def test_a_kill_between_rename_and_pointer_loses_nothing(tmp_path, data, monkeypatch):
    train(tiny_config(data, tmp_path / "a"))
    out = tmp_path / "b"
    with monkeypatch.context() as patch:
        move = checkpoints_module.write_atomically

        def killed(path, content, **options):
            if content == "00000008":
                raise KeyboardInterrupt
            move(path, content, **options)

        patch.setattr(checkpoints_module, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(data, out))
    assert (out / "checkpoints" / "00000008").is_dir()
    assert (out / "checkpoints" / "latest").read_text() == "00000004"
    train(tiny_config(data, out))
    assert_same_end(tmp_path / "a", out, 8)


def test_what_an_interrupted_save_left_is_removed(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    train(config)
    left = tmp_path / "run" / "checkpoints" / ".writing-00000008"
    left.mkdir()
    (left / "state-00000.safetensors").write_bytes(b"half")
    train(config)
    assert not left.exists()


def test_a_checkpoint_that_was_being_deleted_is_no_checkpoint(tmp_path, data, monkeypatch):
    """Killed in the middle of deleting an old one: what is left of it has another name, and goes at the next start."""
    config = tiny_config(data, tmp_path / "run", keep_checkpoints=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: (path / "state.json").unlink(missing_ok=True))
        train(config)
    root = tmp_path / "run" / "checkpoints"
    assert len([p for p in root.iterdir() if p.name.startswith(".writing-")]) == 1
    assert [p.name for p in root.iterdir() if p.name.isdigit()] == ["00000008"]
    train(tiny_config(data, tmp_path / "run", max_steps=9, keep_checkpoints=1))
    assert sorted(p.name for p in root.iterdir()) == ["00000009", "latest"]


def test_a_finished_run_started_again_trains_nothing(tmp_path, data):
    config = tiny_config(data, tmp_path / "run")
    first = train(config)
    again = train(config)
    assert again.step == 8 and again.metrics == first.metrics
    assert again.model.is_dir()


def test_rows_after_the_checkpoint_are_dropped_on_resume(tmp_path, data):
    """A run killed between two checkpoints has logged steps that it will make again."""
    out = tmp_path / "run"
    config = tiny_config(data, out, max_steps=4, log_every=2)
    train(config)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 6, "loss": 1.0}\n{"kind": "tra')
    result = train(tiny_config(data, out, max_steps=8, log_every=2))
    assert [r["step"] for r in result.metrics if r["kind"] == "train"] == [2, 4, 6, 8]


def test_an_asynchronous_save_does_not_see_later_steps(tmp_path):
    """The tensors are copied before save returns: what the thread writes is the state at that moment."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    values, may_write = torch.zeros(3), threading.Event()
    copied = {"x": values.clone()}

    def write(folder):
        may_write.wait()
        write_safetensors(folder / "state-00000.safetensors", copied)

    checkpoints.save(1, write, {}, background=True)
    assert checkpoints.latest() is None
    values.fill_(7)
    may_write.set()
    checkpoints.wait()
    assert torch.equal(load_file(checkpoints.latest() / "state-00000.safetensors")["x"], torch.zeros(3))
