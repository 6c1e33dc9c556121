"""DeepSpeed on CUDA with one NCCL rank: every stage follows the torch engine, and resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from harness.tiny_run import checkpoint_tensors, tiny_config, write_data  # noqa: E402

from sfd_fast.training.diffusion import run_train  # noqa: E402

pytestmark = pytest.mark.gpu
PROGRAM = Path(__file__).resolve().parents[2] / "harness" / "tiny_run.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("torch") / "run"
    run_train(tiny_config(data, out, deterministic=True), device="cuda", progress=False)
    return checkpoint_tensors(out, 8)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_follows_the_torch_engine(data, expected, tmp_path, stage):
    """In a process of its own: a process group cannot be made twice."""
    paths = [*map(str, PROGRAM.parents[1:3]), *sys.path]
    settings = ["device=cuda", "deterministic=true", 'engine="deepspeed"', f"zero_stage={stage}"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(data), str(tmp_path / "run"), *settings],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = checkpoint_tensors(tmp_path / "run", 8)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
