"""training/images.py: evaluation of generated images during training, and sample grids."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.tiny_run import MODEL, pixels, tiny_config, write_data, write_reference

from sfd_fast.commands.evaluate import EvaluateConfig, run_evaluate
from sfd_fast.config import DeepSpeedConfig, GuidanceConfig, RunConfig, SamplerConfig, overlaid
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.transport import noise
from sfd_fast.formats.released_model import load_model
from sfd_fast.sampling.guidance import bind_labels, bind_null, cfg
from sfd_fast.sampling.sampler import sample
from sfd_fast.training.diffusion import diffusion_job, run_train
from sfd_fast.training.loop import build_engine
from sfd_fast.training.run import drawing as images_module
from sfd_fast.training.run.drawing import UNGUIDED, Quality

NUM_IMAGES = 21


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_reference(tmp_path_factory.mktemp("reference") / "reference.npz")


@pytest.fixture
def config(data, reference, tmp_path):
    """Judged at steps 4, 8 and 10; 21 images in micro-batches of 4 leave the last one partly unused."""
    return tiny_config(
        data, tmp_path / "run", max_steps=10, micro_batch_size=4, eval_every=4, eval_images=NUM_IMAGES,
        eval_reference=reference, eval_features="digits",
    )  # fmt: skip


def train(config, **options):
    return run_train(config, device="cpu", progress=False, **({"decode": pixels} | options))


def judged(result):
    return [row for row in result.metrics if row["kind"] == "evaluation"]


def without_evaluation(config, out):
    return replace(config, run=replace(config.run, out=str(out), eval_every=0))


def test_figures_are_those_of_sfd_evaluate_on_images_of_the_exported_model(config, tmp_path):
    """Drawn here by hand from the averaged weights, guided, as the definitions say."""
    config = replace(config, guidance=GuidanceConfig(mode="cfg", scale=1.7))
    result = train(config)
    assert [row["step"] for row in judged(result)] == [4, 8, 10]
    model, labels = load_model(result.model), torch.arange(NUM_IMAGES) % MODEL.num_classes
    x0 = noise(torch.arange(NUM_IMAGES), (4, 4, 4), config.train.seed, random_numbers.SAMPLE_NOISE)
    velocity = cfg(
        bind_labels(model, labels), bind_null(model, labels, MODEL.num_classes), config.guidance,
        num_texture_channels=2, delta_t=0.3,
    )  # fmt: skip
    latents = sample(velocity, x0, delta_t=0.3, config=config.sampler, num_texture_channels=2)
    drawn = (127.5 * pixels(latents[:, :2]) + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    np.savez(tmp_path / "drawn.npz", arr_0=drawn.numpy())
    expected = run_evaluate(
        EvaluateConfig(
            samples=str(tmp_path / "drawn.npz"), reference=config.run.eval_reference, features="digits",
            output=str(tmp_path / "metrics.json"), device="cpu", progress=False,
        )
    )["metrics"]  # fmt: skip
    last = {name: value for name, value in judged(result)[-1].items() if name not in ("kind", "step")}
    assert last.keys() == expected.keys() == {"fd_digits", "precision", "recall"}
    assert last == pytest.approx(expected, rel=1e-3)  # batches of 4 and 21 may round a pixel differently


def test_training_has_the_same_bits_with_and_without_evaluation(config, tmp_path):
    pair = train(config), train(without_evaluation(config, tmp_path / "plain"))
    weights = [load_model(result.model).state_dict() for result in pair]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    losses = [[(r["step"], r["loss"]) for r in result.metrics if r["kind"] == "train"] for result in pair]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_figures_go_to_tensorboard_and_what_is_left_out_is_said_once(config):
    result = train(replace(config, run=replace(config.run, tensorboard=True)))
    events = next((Path(config.run.out) / "tensorboard").glob("events*")).read_bytes()
    assert b"evaluation/fd_digits" in events
    lines = [row["message"] for row in result.metrics if row["kind"] == "event"]
    assert lines.count("evaluation leaves out kid: it needs 1000 images on both sides; the smaller has 21") == 1
    assert lines.count("evaluation leaves out sfid: digits features have no spatial part") == 1


def test_an_evaluation_that_was_cut_short_is_made_when_the_run_goes_on(config, tmp_path, monkeypatch):
    whole = train(replace(config, run=replace(config.run, out=str(tmp_path / "whole"))))
    drawing = Quality.__call__
    with monkeypatch.context() as patch:
        # a signal in the middle of the evaluation of step 8
        asked = iter([False] * 6 + [True])  # each evaluation asks before each of its six micro-batches
        patch.setattr(Quality, "__call__", lambda self, _: drawing(self, lambda: next(asked)))
        stopped = train(config)
    assert (stopped.step, stopped.exit_code) == (8, 75)
    assert [row["step"] for row in judged(stopped)] == [4]
    resumed = train(config)
    assert resumed.exit_code == 0
    assert judged(resumed) == judged(whole)


def test_a_finished_run_is_judged_when_that_is_asked_for_later(config, tmp_path):
    plain = train(replace(config, run=replace(config.run, eval_every=0)))
    assert judged(plain) == []
    again = train(config)
    assert [row["step"] for row in judged(again)] == [10]
    train_again = train(replace(config, run=replace(config.run, out=str(tmp_path / "whole"))))
    assert judged(again) == judged(train_again)[-1:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_reference": "absent.npz"}, "absent.npz does not exist: give an npz file"),
        ({"eval_features": "inception", "eval_weights": "absent.pth"}, "no Inception weights at absent.pth"),
    ],
)
def test_what_is_missing_ends_a_run_before_its_first_step(config, changes, message):
    config = replace(config, run=replace(config.run, log_every=1, **changes))
    with pytest.raises(ValueError, match=message):
        train(config)
    assert '"train"' not in (Path(config.run.out) / "metrics.jsonl").read_text()


def test_latents_without_a_codec_cannot_be_judged(config):
    with pytest.raises(ValueError, match="2 texture channels are no pixels and data.texture_codec is empty"):
        train(config, decode=None)


def test_images_that_are_not_finite_are_counted_not_judged(config):
    broken = train(config, decode=lambda texture: pixels(texture).masked_fill(texture[:, :1, :1, :1] > 0, torch.nan))
    x0 = judged(broken)
    assert all(row.keys() == {"kind", "step", "not_finite"} and 0 < row["not_finite"] < NUM_IMAGES for row in x0)


def test_autoguidance_is_left_out_and_that_is_said_once(config):
    guided = replace(config, guidance=GuidanceConfig(mode="autoguidance", scale=1.5))
    result = train(guided)
    assert [row["message"] for row in result.metrics if row["kind"] == "event"].count(UNGUIDED) == 1


def test_adaptive_steps_under_zero_3_are_refused(config):
    adaptive = replace(config, sampler=SamplerConfig(solver="dopri5"), deepspeed=DeepSpeedConfig(zero_stage=3))
    job = diffusion_job(adaptive, decode=pixels)
    engine = build_engine(job, "cpu")
    engine.world_size = 2
    with pytest.raises(ValueError, match="all ranks must evaluate the network equally often, so choose a solver with"):
        job.quality(engine, say=print)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_draw_equal_numbers_of_full_batches_and_every_image_once(config, world_size):
    job = diffusion_job(config, decode=pixels)
    engine = build_engine(job, "cpu")
    shares = []
    for rank in range(world_size):
        quality = Quality(engine, config, None, pixels, print)
        engine.rank, engine.world_size = rank, world_size
        shares.append(list(quality.micro_batches()))
    assert len({len(share) for share in shares}) == 1
    assert all(len(ids) == 4 for share in shares for ids in share)
    ids = torch.cat([ids for share in shares for ids in share])
    assert ids[:NUM_IMAGES].tolist() == list(range(NUM_IMAGES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_every": 5}, "run.eval_reference is empty: give an npz"),
        ({"eval_images": 1}, "run.eval_images 1 must be at least 2"),
        ({"eval_every": -1}, "eval_every -1 must not be negative"),
        ({"eval_features": "clip"}, "eval_features 'clip' is unknown; choose inception, dinov2 or digits"),
        ({"num_sample_images": 0}, "num_sample_images 0 must be at least 1"),
    ],
)
def test_settings_are_checked_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**changes)


def test_a_grid_decodes_a_few_images_at_once(config, monkeypatch):
    monkeypatch.setattr(images_module, "DECODED_AT_ONCE", 3)
    sizes = []
    config = replace(config, run=replace(config.run, num_sample_images=7, eval_every=0))
    job = diffusion_job(config, decode=lambda texture: sizes.append(len(texture)) or pixels(texture))
    picture = job.samples(build_engine(job, "cpu"))
    assert sizes == [3, 3, 1]
    assert picture.shape == (3, 3 * 8, 3 * 8) and picture[:, -8:, -8:].float().std() == 0  # 7 of 9 places


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler.num_inference_steps": 2}, "num_inference_steps 2 is too small: delta_t 0.3 has 3 stages"),
        ({"guidance.mode": "cfg", "guidance.scale": 2.0, "model.class_dropout": 0.0}, "'cfg' needs a null class"),
    ],
)
def test_settings_under_which_nothing_could_be_drawn_end_a_run_before_its_first_step(config, changes, message):
    with pytest.raises(ValueError, match=message):
        diffusion_job(overlaid(config, changes))
