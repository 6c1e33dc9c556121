"""`sfd sample`: the same files on any number of processes, after a kill, in any format; and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfd_fast import generate, image_files, streams
from sfd_fast.config import ModelConfig, SamplerConfig
from sfd_fast.data.statistics import LatentStatistics
from sfd_fast.generate import SampleConfig, balanced_labels, chosen_settings, run_sample
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.texture import IdentityCodec
from sfd_fast.pipeline import SFDPipeline

TINY = ModelConfig(
    hidden_size=32, depth=1, num_heads=2, grid_size=4, texture_channels=4, semantic_channels=2, num_classes=5,
    repa_channels=0,
)  # fmt: skip
ROOT = Path(generate.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LightningDiT(TINY)
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    pipeline = SFDPipeline(
        network,
        statistics=LatentStatistics(torch.zeros(4), torch.full((4,), 0.5), torch.zeros(2), torch.ones(2)),
        codec=IdentityCodec(4, 2),
        delta_t=0.3,
        sampler=SamplerConfig(solver="euler", num_steps=4),
        micro_batch_size=4,
        device="cpu",
    )
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


def settings(model, out, **changes):
    base = SampleConfig(model=str(model), out=str(out), num=18, format="npz", progress=False, device="cpu", grid=9)
    return replace(base, **changes)


def as_rank(monkeypatch, rank, world_size):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """samples.npz of one undisturbed process."""
    result = run_sample(settings(model, tmp_path_factory.mktemp("whole") / "out"))
    return result.npz.read_bytes()


def test_npz_has_the_evaluators_layout_shuffled_by_the_recorded_seed(model, tmp_path):
    result = run_sample(settings(model, tmp_path, shuffle_seed=3))
    assert (result.num_made, result.npz) == (18, tmp_path / "samples.npz")
    with np.load(result.npz) as stored:
        images, labels, ids = stored["arr_0"], stored["arr_1"], stored["sample_ids"]
    assert images.dtype == np.uint8
    assert images.shape == (18, 8, 8, 3)
    assert json.loads((tmp_path / "run.json").read_text())["shuffle_seed"] == 3
    assert np.array_equal(ids, streams.permutation(18, seed=3, stream=streams.OUTPUT_ORDER).numpy())
    assert np.array_equal(labels, ids % 5)
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    direct = pipeline(torch.arange(18) % 5, output_type="np").images
    assert np.array_equal(images, direct[ids])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "run.json", "samples.npz"]
    assert Image.open(tmp_path / "grid.png").size == (3 * 48 + 2 * 2,) * 2


def test_labels_are_class_balanced_or_given(model, tmp_path):
    counts = torch.bincount(balanced_labels(17, 5))
    assert counts.max() - counts.min() <= 1
    result = run_sample(settings(model, tmp_path, num=0, labels=(4, 2, 2)))
    with np.load(result.npz) as stored:
        assert stored["arr_1"][np.argsort(stored["sample_ids"])].tolist() == [4, 2, 2]
    result = run_sample(settings(model, tmp_path / "more", num=7, labels=(4, 2, 2)))
    with np.load(result.npz) as stored:
        assert stored["arr_1"][np.argsort(stored["sample_ids"])].tolist() == [4, 2, 2, 4, 2, 2, 4]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_processes_writes_the_same_bytes(world_size, model, expected, tmp_path, monkeypatch):
    made = []
    for rank in reversed(range(world_size)):
        as_rank(monkeypatch, rank, world_size)
        made.append(run_sample(settings(model, tmp_path)).num_made)
    assert sum(made) == 18
    assert (tmp_path / "samples.npz").read_bytes() == expected


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(model, expected, tmp_path):
    script = """
import sys, time
from sfd_fast import generate
write = generate.write_part
def slowly(path, images):
    write(path, images)
    time.sleep(0.5)  # so that the kill comes while parts are missing
generate.write_part = slowly
generate.run_sample(generate.SampleConfig(
    model=sys.argv[1], out=sys.argv[2], num=18, format="npz", progress=False, device="cpu", grid=9, num_writers=1))
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(model), str(tmp_path)], env=os.environ | {"PYTHONPATH": path}
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "parts").glob("[0-9]*.npy")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list((tmp_path / "parts").glob("[0-9]*.npy")))
    assert 1 <= there < 5
    (tmp_path / "parts" / ".writing-00000004.npy").write_bytes(b"torn")  # as a kill in the middle of a write leaves
    result = run_sample(settings(model, tmp_path))
    assert result.num_made <= 18 - 4 * there + 2
    assert result.npz.read_bytes() == expected


def test_a_finished_run_makes_nothing_again(model, tmp_path, monkeypatch):
    first = run_sample(settings(model, tmp_path))
    content = first.npz.read_bytes()
    again = run_sample(settings(model, tmp_path))
    assert again.num_made == 0
    assert again.npz.read_bytes() == content


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_pictures_hold_the_exact_pixels_and_their_run_goes_on(kind, model, tmp_path):
    run_sample(settings(model, tmp_path, format=kind))
    files = sorted((tmp_path / "images").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.{kind}" for i in range(18)]
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    direct = pipeline(torch.arange(18) % 5, output_type="np").images
    assert all(np.array_equal(np.asarray(Image.open(f)), image) for f, image in zip(files, direct))
    assert np.load(tmp_path / "labels.npy").tolist() == [i % 5 for i in range(18)]
    files[9].unlink()
    assert run_sample(settings(model, tmp_path, format=kind)).num_made == 4  # its micro-batch
    assert np.array_equal(np.asarray(Image.open(files[9])), direct[9])


def test_options_of_a_run_replace_the_pipelines(model, tmp_path):
    guided = settings(model, tmp_path, guidance_mode="cfg", guidance_scale=2.0, num_steps=3, solver="heun")
    run_sample(guided)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["sampler"] | {"solver": "heun", "num_steps": 3} == record["sampler"]
    assert (record["guidance"]["mode"], record["guidance"]["scale"]) == ("cfg", 2.0)


def test_one_option_leaves_the_pipelines_others_alone(model):
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    own = pipeline.sampler
    sampler, guidance = chosen_settings(
        SampleConfig(solver="heun", texture_scale=1.3, guidance_mode="cfg", interval_start=0.2), pipeline
    )
    assert sampler == replace(own, solver="heun")
    assert (guidance.scales, guidance.interval_start) == ((1.3, pipeline.guidance.scale), 0.2)


@pytest.mark.parametrize("labels", ["1,2", "1 2", "[1, 2]", [1, 2], (1, 2)])
def test_labels_are_given_as_people_write_them(labels):
    assert SampleConfig(labels=labels).labels == (1, 2)


def test_labels_that_are_no_numbers_are_an_error():
    with pytest.raises(ValueError, match="labels 'cat' must be numbers of classes"):
        SampleConfig(labels="cat")


def test_the_three_stage_strip_is_drawn(model, tmp_path):
    run_sample(settings(model, tmp_path, show_stages=True))
    assert Image.open(tmp_path / "stages.png").size[0] > 500


def test_a_folder_of_other_samples_is_an_error(model, tmp_path):
    run_sample(settings(model, tmp_path))
    with pytest.raises(ValueError, match="holds samples of other settings: seed is 0 there and 1 now"):
        run_sample(settings(model, tmp_path, seed=1))
    with pytest.raises(ValueError, match="sampler is .*num_steps.*choose another folder with --out"):
        run_sample(settings(model, tmp_path, num_steps=5))


def test_other_weights_in_the_same_folder_are_an_error(model, tmp_path):
    run_sample(settings(model, tmp_path / "out"))
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    pipeline.model.final_layer.linear.bias.data[0] += 1
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds samples of other settings: weights is"):
        run_sample(settings(tmp_path / "other", tmp_path / "out"))


def test_an_unwritable_folder_is_an_error(model, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot be written .*choose another folder with --out"):
        run_sample(settings(model, tmp_path / "file" / "out"))


def test_a_full_disk_stops_the_run_and_keeps_what_is_complete(model, expected, tmp_path, monkeypatch):
    written = []
    whole = image_files.write_whole

    def full(path, content):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        whole(path, content)

    monkeypatch.setattr(image_files, "write_whole", full)
    with pytest.raises(OSError, match="could not be written .*No space left on device.*run the same command again"):
        run_sample(settings(model, tmp_path, num_writers=1))
    assert len(list((tmp_path / "parts").glob("[0-9]*.npy"))) == 2
    monkeypatch.setattr(image_files, "write_whole", whole)
    result = run_sample(settings(model, tmp_path))
    assert result.num_made == 18 - 8
    assert result.npz.read_bytes() == expected


def test_a_rank_that_has_stopped_is_an_error(model, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "STALL_S", 0.3)
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(OSError, match="2 of 5 micro-batches are missing.*another process has stopped"):
        run_sample(settings(model, tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": (5,)}, "label 5 is out of range: this model has the classes 0 to 4"),
        ({"num_steps": 2}, "num_steps 2 is too small"),
        ({"guidance_mode": "autoguidance", "guidance_scale": 1.5}, "needs a guide model"),
        ({"model": ""}, "model is empty; give a pipeline folder"),
        ({"backend": "cuda_graph"}, "'cuda_graph' needs a CUDA device"),
    ],
)
def test_bad_settings_say_what_is_wrong(changes, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_sample(replace(settings(model, tmp_path), **changes))


def test_contradictory_rank_is_an_error(model, tmp_path, monkeypatch):
    as_rank(monkeypatch, 2, 2)
    with pytest.raises(ValueError, match=r"RANK 2 must be in \[0, WORLD_SIZE = 2\)"):
        run_sample(settings(model, tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num": -1}, "num -1 must not be negative"),
        ({"format": "jpeg"}, "format 'jpeg' is unknown"),
        ({"num_writers": 0}, "num_writers 0 must be at least 1"),
    ],
)
def test_bad_options_are_errors_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**changes)
