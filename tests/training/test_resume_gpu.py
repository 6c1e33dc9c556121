"""Exact continuation on CUDA under train.deterministic: stopped or killed runs end with the bits of an unbroken one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness.tiny_run import checkpoint_tensors, tiny_config, write_data

from sfd_fast.training.diffusion import run_train
from sfd_fast.training.loop import Stop

pytestmark = pytest.mark.gpu
PROGRAM = Path(__file__).resolve().parents[1] / "harness" / "tiny_run.py"
STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("latents"))


def config(data, out, precision):
    return tiny_config(data, out, precision=precision, deterministic=True, max_steps=STEPS)


def train(settings):
    return run_train(settings, device="cuda", progress=False)


def assert_same_end(a, b):
    left, right = checkpoint_tensors(a, STEPS), checkpoint_tensors(b, STEPS)
    assert left.keys() == right.keys() and len(left) > 0
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("precision", ["fp32", "parity", "bf16"])
def test_a_stopped_run_ends_with_the_same_bits(data, tmp_path, monkeypatch, precision):
    train(config(data, tmp_path / "a", precision))
    with monkeypatch.context() as patch:
        calls = iter(range(1, 10_000))
        patch.setattr(Stop, "requested", lambda self: next(calls) == 17)
        assert train(config(data, tmp_path / "b", precision)).step == 17
    assert not train(config(data, tmp_path / "b", precision)).preempted
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_a_killed_run_ends_with_the_same_bits(data, tmp_path):
    train(config(data, tmp_path / "a", "parity"))
    out = tmp_path / "b"
    settings = ["device=cuda", "deterministic=true", "precision=parity", f"max_steps={STEPS}"]
    command = [sys.executable, str(PROGRAM), str(data), str(out), *settings]
    paths = [*map(str, PROGRAM.parents[1:3]), *sys.path]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    until = time.monotonic() + 200
    while not (out / "checkpoints" / "latest").exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (out / "checkpoints" / "latest").exists()
    train(config(data, out, "parity"))
    assert_same_end(tmp_path / "a", out)
