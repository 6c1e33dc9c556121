"""`srun sfd X`: two tasks of a step share one command's work, and together leave what one process leaves."""

import json

import numpy as np
import pytest
from harness.launchers import clean_environment, run_together, stand_ins
from harness.tiny_caches import GRID, SIZE, contents
from harness.tiny_pipelines import build

pytest_plugins = ["harness.cache_fixtures"]


@pytest.fixture
def srun(tmp_path):
    environment = clean_environment(stand_ins(tmp_path / "bin"))

    def run(command, tasks, **options):
        """Its output, in so many tasks; with 0 without srun."""
        flags = [f"--{name}={value}" for name, value in options.items()]
        words = ["srun"] * bool(tasks) + ["sfd", command, *flags, "--device=cpu"]
        variables = environment | {"STAND_IN_TASKS": str(tasks)}
        codes, output = run_together([words], folder=tmp_path, environment=variables)
        assert codes == [0], output[-4000:]
        return output

    return run


SHARDS = {"image_size": SIZE, "shard_size": 2, "batch_size": 4, "num_threads": 1, "flip": "true"}


def test_encode_in_two_tasks_of_a_slurm_step(parts, encoded_cache, tmp_path, srun):
    output = srun("encode", 2, out=tmp_path / "out", storage="fp32", features="true", **SHARDS, **parts)
    assert "13 images in 7 shards" in output and "on 2 rank(s)" in output
    assert contents(tmp_path / "out") == contents(encoded_cache)


def test_features_in_two_tasks_of_a_slurm_step(parts, tmp_path, srun):
    sources = {"images": parts["images"], "vfm": parts["vfm"], "grid_size": GRID}
    output = srun("features", 2, out=tmp_path / "two", **sources, **SHARDS)
    assert "on 2 rank(s)" in output
    srun("features", 0, out=tmp_path / "one", **sources, **SHARDS)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_sample_in_two_tasks_of_a_slurm_step(tmp_path, srun):
    build(guide=None, guidance=None, micro_batch_size=2).save_pretrained(tmp_path / "model")
    settings = {"model": tmp_path / "model", "num_images": 10, "num_inference_steps": 4, "format": "npz"}
    srun("sample", 2, out=tmp_path / "two", **settings)
    srun("sample", 0, out=tmp_path / "one", **settings)
    assert (tmp_path / "two" / "samples.npz").read_bytes() == (tmp_path / "one" / "samples.npz").read_bytes()


def test_evaluate_in_two_tasks_of_a_slurm_step(tmp_path, srun):
    for name, seed in (("samples", 0), ("reference", 1)):
        images = np.random.default_rng(seed).integers(0, 255, (41, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    settings = {"samples": tmp_path / "samples.npz", "reference": tmp_path / "reference.npz", "features": "digits"}
    output = srun("evaluate", 2, output=tmp_path / "two.json", **settings)
    assert output.count("written to") == 1
    srun("evaluate", 0, output=tmp_path / "one.json", **settings)
    two, one = (json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-6)
