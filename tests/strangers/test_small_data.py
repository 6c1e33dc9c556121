"""A newcomer with a few images on a laptop: the presets for it train on any cache without a size being given."""

import json

import pytest

from sfd_fast import cli
from sfd_fast.commands.inspect import InspectConfig, meaning, run_inspect
from sfd_fast.formats.released_model import load_model

pytest_plugins = ["harness.cache_fixtures"]


@pytest.mark.parametrize("preset", ["MICRO", "TINY"])
def test_a_laptops_preset_trains_on_a_small_cache_with_its_sizes(encoded_cache, tmp_path, preset):
    cli.main([
        "train", "--preset", preset, "--data.path", str(encoded_cache), "--out", str(tmp_path / "run"),
        "--train.max_steps", "1", "--train.global_batch_size", "2", "--train.precision", "fp32", "--run.log_every", "1",
        "--run.sample_every", "0", "--run.validate_every", "0", "--run.tensorboard", "false",
        "--data.validation_samples", "0",
    ])  # fmt: skip
    model = load_model(tmp_path / "run" / "model").config
    assert (model.texture_channels, model.semantic_channels, model.grid_size) == (4, 3, 8)
    assert (model.num_classes, model.repa_channels) == (3, 24)
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1]


@pytest.mark.parametrize(("cosine", "advice"), [(-0.02, True), (0.3, True), (0.9, False)])
def test_a_cosine_is_said_with_its_meaning(cosine, advice):
    said = meaning(cosine)
    assert "1 is perfect, 0 is chance" in said
    assert ("train it longer, or give `sfd encode` the vfm" in said) == advice


def test_inspect_shows_the_meaning_beside_the_figure(encoded_cache):
    lines = []
    run_inspect(InspectConfig(path=str(encoded_cache), picture="none"), lines.append)
    cosine = json.loads((encoded_cache / "manifest.json").read_text())["semvae_target_cosine"]
    assert any(f"{cosine:.4f} ({meaning(cosine)})" in line for line in lines)
