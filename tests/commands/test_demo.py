"""The embedded demo makes every file it promises, and what it makes can be used. Its quality: benchmarks/demo.py."""

import json

import numpy as np
import pytest
import torch
from harness.tiny_pipelines import drawn
from PIL import Image

from sfd_fast.commands.demo import DemoConfig, report, run_demo, uint8
from sfd_fast.data import digits
from sfd_fast.sampling.pipeline import SFDPipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A demo of few steps: everything is there, the digits are bad."""
    out = tmp_path_factory.mktemp("demo")
    run_demo(
        DemoConfig(
            out=str(out), num_images=500, encoder_steps=60, semvae_steps=30, train_steps=40, guide_steps=10,
            num_inference_steps=4, progress=False,
        )
    )  # fmt: skip
    return out


def test_the_samples_are_class_balanced_images(made):
    samples = np.load(made / "samples.npz")
    assert samples["arr_0"].shape == (500, 8, 8, 3)
    assert samples["arr_0"].dtype == np.uint8
    assert np.bincount(samples["arr_1"]).tolist() == [50] * 10


@pytest.mark.parametrize("name", ["samples.png", "training.png", "stages.png"])
def test_the_pictures_open(made, name):
    with Image.open(made / name) as picture:
        assert min(picture.size) > 200
        assert len(set(picture.convert("L").resize((64, 64)).getdata())) > 10


def test_the_metrics_stand_beside_those_of_real_digits(made):
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["recognised_held_out"] > 0.97
    for key in ("recognised", "nearest_ratio", "frechet_to_held_out", "frechet_between_real_halves", "seconds"):
        assert np.isfinite(metrics[key])
    assert metrics["frechet_to_held_out"] > metrics["frechet_between_real_halves"]


def test_the_pipeline_draws_the_same_digits_again(made):
    pipeline = SFDPipeline.from_pretrained(made / "model", device="cpu")
    again = drawn(pipeline, ["three", 7], sample_ids=[3, 7], seed=0)
    threads = torch.get_num_threads()
    assert threads == 1
    assert np.array_equal(again, np.load(made / "samples.npz")["arr_0"][[3, 7]])


def test_the_judge_knows_copies_from_new_digits():
    train, held_out = digits.load(seed=1)
    judge = digits.Judge(uint8(train), train.labels.numpy())
    assert judge.nearest_distance(uint8(train)[:50]) == 0
    assert judge.nearest_distance(uint8(held_out)) > 0.8
    assert judge.accuracy(uint8(held_out), held_out.labels.numpy()) > 0.97


def test_training_and_held_out_digits_are_disjoint_and_complete():
    train, held_out = digits.load(seed=2)
    assert (len(train), len(held_out)) == (1297, 500)
    both = torch.cat([train.images, held_out.images]).flatten(1)
    everything = torch.cat([d.images for d in digits.load(seed=0)]).flatten(1)
    assert torch.equal(both.sort(dim=0).values, everything.sort(dim=0).values)


def test_the_closing_lines_call_copies_copies(tmp_path, capsys):
    metrics = {
        "recognised": 0.9, "recognised_held_out": 0.98, "num_images": 500, "nearest_training_digit": 0.1,
        "frechet_to_held_out": 1.0, "frechet_between_real_halves": 0.2, "seconds": 1.0,
    }  # fmt: skip
    report(tmp_path, metrics | {"nearest_ratio": 0.2})
    assert "they may be copies" in capsys.readouterr().out
    report(tmp_path, metrics | {"nearest_ratio": 0.9})
    assert "they are no copies" in capsys.readouterr().out


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="num_images 3 must be at least 10"):
        DemoConfig(num_images=3)


def test_a_folder_of_another_origin_is_left_alone(tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds main and no demo.json, so `sfd demo` did not write it: choose another"):
        run_demo(DemoConfig(out=str(tmp_path)))
    assert (tmp_path / "main" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["main"]
