"""`sfd sample`: the same files on any number of processes, after a kill, in any format; and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.tiny_pipelines import drawn
from PIL import Image

from sfd_fast import pictures
from sfd_fast.commands.sample import SampleConfig, run_sample
from sfd_fast.config import GuidanceConfig, ModelConfig, SamplerConfig
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.files.lock import FolderLock
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.texture import IdentityCodec
from sfd_fast.ranks import launch_name
from sfd_fast.sampling import image_writer, large_scale
from sfd_fast.sampling import output as sample_files
from sfd_fast.sampling.large_scale import balanced_labels
from sfd_fast.sampling.pipeline import SFDPipeline

TINY = ModelConfig(
    hidden_size=32, depth=1, num_heads=2, grid_size=4, texture_channels=4, semantic_channels=2, num_classes=5,
    repa_channels=0,
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED_FLAGS = (
    "hostfile", "include", "exclude", "num_nodes", "min_elastic_nodes", "max_elastic_nodes", "num_gpus",
    "num_accelerators", "master_port", "master_addr", "node_rank", "launcher", "launcher_args", "module", "no_python",
    "no_local_rank", "no_ssh_check", "no_ssh", "save_pid", "enable_each_rank_log", "autotuning", "elastic_training",
    "force_multi", "bind_cores_to_rank", "bind_core_list", "ssh_port", "venv_script",
)  # fmt: skip
"""of deepspeed 0.19's launcher"""


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
        texture_codec=IdentityCodec(4, 2),
        delta_t=0.3,
        sampler=SamplerConfig(solver="euler", num_inference_steps=4),
        micro_batch_size=4,
        device="cpu",
    )
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


def settings(model, out, **changes):
    base = {"num_images": 18, "format": "npz", "progress": False, "device": "cpu", "grid": 9}
    return SampleConfig(model=str(model), out=str(out), **base | changes)


def environment(**extra):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | extra


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
    assert np.array_equal(ids, random_numbers.permutation(18, seed=3, stream=random_numbers.OUTPUT_ORDER).numpy())
    assert np.array_equal(labels, ids % 5)
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    direct = drawn(pipeline, torch.arange(18) % 5)
    assert np.array_equal(images, direct[ids])
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "grid.png", "run.json", "samples.npz"]
    assert Image.open(tmp_path / "grid.png").size == (3 * 48 + 2 * 2,) * 2


def test_labels_are_class_balanced_or_given(model, tmp_path):
    counts = torch.bincount(balanced_labels(17, range(5)))
    assert counts.max() - counts.min() <= 1
    result = run_sample(settings(model, tmp_path, num_images=0, labels=(4, 2, 2)))
    with np.load(result.npz) as stored:
        assert stored["arr_1"][np.argsort(stored["sample_ids"])].tolist() == [4, 2, 2]
    result = run_sample(settings(model, tmp_path / "more", num_images=7, labels=(4, 2, 2)))
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
from sfd_fast.commands import sample as generate
from sfd_fast.sampling import output as sample_files
write = sample_files.write_array
def slowly(path, images):
    write(path, images)
    time.sleep(0.5)  # so that the kill comes while parts are missing
sample_files.write_array = slowly
generate.run_sample(generate.SampleConfig(
    model=sys.argv[1], out=sys.argv[2], num_images=18, format="npz", progress=False, device="cpu", grid=9,
    num_writers=1, precision="fp32"))
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(model), str(tmp_path)], env=environment())
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
    direct = drawn(pipeline, torch.arange(18) % 5)
    assert all(np.array_equal(np.asarray(Image.open(f)), image) for f, image in zip(files, direct))
    assert np.load(tmp_path / "labels.npy").tolist() == [i % 5 for i in range(18)]
    files[9].unlink()
    assert run_sample(settings(model, tmp_path, format=kind)).num_made == 4  # its micro-batch
    assert np.array_equal(np.asarray(Image.open(files[9])), direct[9])


def test_options_of_a_run_replace_the_pipelines(model, tmp_path):
    guided = settings(model, tmp_path, guidance_mode="cfg", guidance_scale=2.0, num_inference_steps=3, solver="heun")
    run_sample(guided)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["sampler"] | {"solver": "heun", "num_inference_steps": 3} == record["sampler"]
    assert (record["guidance"]["mode"], record["guidance"]["scale"]) == ("cfg", 2.0)


def test_one_option_leaves_the_pipelines_others_alone(model):
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    own = pipeline.sampler
    given = SampleConfig(solver="heun", texture_scale=1.3, guidance_mode="cfg", interval_start=0.2)
    sampler, guidance = pipeline.resolve(**given.settings)
    assert sampler == replace(own, solver="heun")
    assert (guidance.scales, guidance.interval_start) == ((1.3, pipeline.guidance.scale), 0.2)


@pytest.mark.parametrize(
    "labels, found",
    [
        *((labels, ("1", "2")) for labels in ("1,2", "1 2", "[1, 2]", "'1','2'")),
        *((labels, (1, 2)) for labels in ([1, 2], (1, 2))),
        ("golden retriever, tabby cat,7", ("golden retriever", "tabby cat", "7")),
        (["tabby cat", 7], ("tabby cat", 7)),
    ],
)
def test_labels_are_given_as_people_write_them(labels, found):
    assert SampleConfig(labels=labels).labels == found


@pytest.mark.parametrize("labels", [[0.7, 1.9], [1.0], [None], [True]])
def test_labels_that_are_neither_names_nor_whole_numbers_are_an_error(labels):
    with pytest.raises(ValueError, match=r"labels '.*' must be numbers or names of classes"):
        SampleConfig(labels=labels)


def test_the_three_stage_strip_shows_each_stage_moving_its_streams(model, tmp_path, monkeypatch):
    """delta_t 0.3: texture rests until tau 0.3, semantics rest from tau 1 on; the picture shows what was computed."""
    drawn = {}
    strip = pictures.stage_strip

    def spy(path, taus, semantic, texture, labels, delta_t):
        drawn.update(taus=taus, semantic=semantic, texture=texture, labels=labels)
        strip(path, taus, semantic, texture, labels, delta_t)

    monkeypatch.setattr(pictures, "stage_strip", spy)
    result = run_sample(settings(model, tmp_path, show_stages=True, num_inference_steps=13, labels=(3, 1, 4, 2)))
    taus = drawn["taus"]
    assert taus[0] == 0 and taus[-1] == pytest.approx(1.3)
    assert 0.3 in [round(tau, 6) for tau in taus] and 1.0 in [round(tau, 6) for tau in taus]
    for before, after in pairwise(range(len(taus))):
        semantic_moves = not np.array_equal(drawn["semantic"][before], drawn["semantic"][after])
        texture_moves = not np.array_equal(drawn["texture"][before], drawn["texture"][after])
        assert semantic_moves == (taus[before] < 1 - 1e-6)
        assert texture_moves == (taus[after] > 0.3 + 1e-6)
    with np.load(result.npz) as stored:
        images = stored["arr_0"][np.argsort(stored["sample_ids"])]
    assert drawn["labels"] == [3, 1, 4, 2]
    assert np.array_equal(drawn["texture"][-1], images[:4])
    width, height = Image.open(tmp_path / "stages.png").size
    assert width > 500 and height > 500


@pytest.mark.parametrize(
    ("format", "name"),
    [("npz", "samples.npz"), ("npz", "parts/00000000.npy"), ("png", "images/000000.png"), ("png", "labels.npy"),
     ("png", "grid.png"), ("npz", "stages.png")],
)  # fmt: skip
def test_a_folder_with_files_of_others_is_left_alone(model, tmp_path, format, name):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"of someone")
    with pytest.raises(ValueError, match=r"is there already and was not written by this command"):
        run_sample(settings(model, tmp_path / "out", format=format))
    assert mine.read_bytes() == b"of someone" and not (tmp_path / "out" / "run.json").exists()


def test_a_folder_of_other_samples_is_an_error(model, tmp_path):
    run_sample(settings(model, tmp_path))
    with pytest.raises(ValueError, match="holds samples of other settings: seed is 0 there and 1 now"):
        run_sample(settings(model, tmp_path, seed=1))
    with pytest.raises(ValueError, match="sampler is .*num_inference_steps.*choose another folder with --out"):
        run_sample(settings(model, tmp_path, num_inference_steps=5))


def test_other_weights_in_the_same_folder_are_an_error(model, tmp_path):
    run_sample(settings(model, tmp_path / "out"))
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    pipeline.transformer.final_layer.linear.bias.data[0] += 1
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds samples of other settings: weights is"):
        run_sample(settings(tmp_path / "other", tmp_path / "out"))


def test_an_unwritable_folder_is_an_error(model, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot be written .*choose another folder with --out"):
        run_sample(settings(model, tmp_path / "file" / "out"))


def test_a_full_disk_stops_the_run_and_keeps_what_is_complete(model, expected, tmp_path, monkeypatch):
    written = []
    whole = image_writer.write_atomically

    def full(path, content, **options):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        whole(path, content, **options)

    monkeypatch.setattr(image_writer, "write_atomically", full)
    with pytest.raises(OSError, match="No space left on device.*what is complete is kept: make room and run the same"):
        run_sample(settings(model, tmp_path, num_writers=1))
    assert len(list((tmp_path / "parts").glob("[0-9]*.npy"))) == 2
    monkeypatch.setattr(image_writer, "write_atomically", whole)
    result = run_sample(settings(model, tmp_path))
    assert result.num_made == 18 - 8
    assert result.npz.read_bytes() == expected


def test_a_rank_that_never_comes_is_given_up(model, tmp_path, monkeypatch):
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(OSError, match=r"2 of 5 micro-batches are missing.*--stall_s 0.3.*another process has stopped"):
        run_sample(settings(model, tmp_path, stall_s=0.3))


RANK_ONE = """
import os, sys, time
from pathlib import Path
from sfd_fast.sampling.output import occupied
with occupied(Path(sys.argv[1]), 1, 900):
    print("inside", flush=True)
    if sys.argv[2] == "error":
        raise OSError("no space left on its disk")
    time.sleep(100)
"""


@pytest.mark.parametrize("end", ["kill", "error"])
def test_a_lost_rank_is_told_at_once_and_with_its_reason(end, model, tmp_path, monkeypatch):
    as_rank(monkeypatch, 0, 2)
    with FolderLock(tmp_path, command="sfd sample", advice="", launch=launch_name()):  # a third that lives
        lost = subprocess.Popen(
            [sys.executable, "-c", RANK_ONE, str(tmp_path), end], env=environment(RANK="1", WORLD_SIZE="2"),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert lost.stdout.readline() == "inside\n"
        if end == "kill":
            lost.kill()
        lost.wait()
        lost.stdout.close()
        reason = ": no space left on its disk" if end == "error" else ""
        message = rf"2 of 5 micro-batches .* and rank 1 \(process {lost.pid} on .*\) has stopped{reason}; run the same"
        with pytest.raises(OSError, match=message):
            run_sample(settings(model, tmp_path))
    as_rank(monkeypatch, 1, 2)
    run_sample(settings(model, tmp_path))
    as_rank(monkeypatch, 0, 2)
    assert run_sample(settings(model, tmp_path)).npz.exists()
    assert not list(tmp_path.glob(".alive-*"))


def test_a_rank_whose_first_is_lost_says_so(model, tmp_path, monkeypatch, capsys):
    as_rank(monkeypatch, 1, 2)
    with FolderLock(tmp_path, command="sfd sample", advice="", launch=launch_name()):
        (tmp_path / ".alive-0").write_text(json.dumps({"pid": 7, "host": "h", "reason": "out of memory"}))
        run_sample(settings(model, tmp_path))
    assert "rank 0 (process 7 on h) has stopped: out of memory: run the same command again" in capsys.readouterr().out


def test_the_second_command_in_a_folder_is_told_who_is_there(model, tmp_path):
    holder = "with occupied(Path(sys.argv[1]), 0, 900):\n    print('inside', flush=True)\n    time.sleep(100)"
    script = "import sys, time\nfrom pathlib import Path\nfrom sfd_fast.sampling.output import occupied\n" + holder
    first = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "inside\n"
        with pytest.raises(OSError, match=rf"in use by `sfd sample` \(process {first.pid} on .*\): wait for it, "):
            run_sample(settings(model, tmp_path))
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    assert run_sample(settings(model, tmp_path)).num_made == 18


@pytest.mark.parametrize("kind", ["png", "webp", "npz"])
@pytest.mark.parametrize("left", [0, 20, -1])
def test_emptied_and_cut_files_are_drawn_again(left, kind, model, expected, tmp_path):
    done = settings(model, tmp_path, format=kind)
    if kind == "npz":
        with pytest.raises(ValueError, match="stop"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample_files.SampleFiles, "gather", lambda *rest: (_ for _ in ()).throw(ValueError("stop")))
            run_sample(done)
        damaged = tmp_path / "parts" / "00000004.npy"
    else:
        run_sample(done)
        damaged = tmp_path / "images" / f"000005.{kind}"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:left])
    (damaged.parent / ".writing-1-2-x").write_bytes(b"torn")
    result = run_sample(done)
    assert result.num_made == 4
    assert not (damaged.parent / ".writing-1-2-x").exists()
    if kind == "npz":
        assert result.npz.read_bytes() == expected
    else:
        assert damaged.read_bytes() == whole


@pytest.mark.parametrize("left", [0, -30])
def test_a_damaged_npz_is_made_again(left, model, expected, tmp_path):
    npz = run_sample(settings(model, tmp_path)).npz
    npz.write_bytes(npz.read_bytes()[:left])
    assert run_sample(settings(model, tmp_path)).num_made == 18
    assert npz.read_bytes() == expected


def test_no_flag_is_the_beginning_of_a_launchers_flag():
    """torchrun and deepspeed look at all words, and take an abbreviation of several of their own for a mistake."""
    from torch.distributed.run import get_args_parser

    theirs = {word for action in get_args_parser()._actions for word in action.option_strings}
    theirs |= {f"--{name}" for name in DEEPSPEED_FLAGS} | {flag.replace("-", "_") for flag in theirs}
    for field in fields(SampleConfig):
        assert not [flag for flag in theirs if flag.startswith(f"--{field.name}")], field.name


def files_of_two_processes(model, tmp_path):
    """What rank 0 of two has before it waits: its own three of five units."""
    whole = run_sample(settings(model, tmp_path / "whole", format="png"))
    files = sample_files.SampleFiles(tmp_path / "out", "png", 18, 4)
    shutil.copytree(whole.out / "images", files.folder)
    for first in (4, 12):
        for number in files.numbers(first):
            files.image(number).unlink()
    return files, whole.out / "images"


def test_a_slow_process_that_lives_is_waited_for(model, tmp_path):
    """Its units take three times as long as a dead process is waited for."""
    files, source = files_of_two_processes(model, tmp_path)

    def slow():
        with sample_files.occupied(files.out, 1, 0.4):
            for first in (4, 12):
                time.sleep(1.2)
                for number in files.numbers(first):
                    shutil.copy(source / f"{number:06d}.png", files.image(number))

    thread = threading.Thread(target=slow)
    progress = sample_files.Progress(files, shown=False)
    assert (progress.done, progress.units_before) == (10, 3)
    thread.start()
    sample_files.wait_for_all(files, progress, 0.4)
    thread.join()
    assert progress.done == 18
    assert not list(files.out.glob(".alive-*"))


def test_a_process_that_lives_but_writes_nothing_is_given_up_in_the_end(model, tmp_path):
    files, _ = files_of_two_processes(model, tmp_path)
    start = time.monotonic()
    with (
        sample_files.occupied(files.out, 1, 0.2),
        pytest.raises(OSError, match="2 of 5 micro-batches are missing.*another process lives but hangs"),
    ):
        sample_files.wait_for_all(files, sample_files.Progress(files, shown=False), 0.2)
    assert time.monotonic() - start > 2


def test_two_processes_at_the_same_time_write_the_bytes_of_one(model, expected, tmp_path):
    script = """
import sys, time
from pathlib import Path
from sfd_fast import cli
from sfd_fast.commands import sample as generate
load, place = generate.load_pipeline, Path(sys.argv[1])
def meet(config, ranks):
    pipeline = load(config, ranks)
    (place / f"ready-{ranks.rank}").touch()
    while len(list(place.glob("ready-*"))) < 2:
        time.sleep(0.002)
    return pipeline
generate.load_pipeline = meet
cli.main(sys.argv[2:])
"""
    out = tmp_path / "out"
    options = ["--num_images", "18", "--format", "npz", "--grid", "9", "--device", "cpu", "--progress", "false"]
    options += ["--precision", "fp32"]
    command = [sys.executable, "-c", script, str(tmp_path)]
    command += ["sample", "--model", str(model), "--out", str(out), *options]
    processes = [
        subprocess.Popen(
            command, env=environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert (out / "samples.npz").read_bytes() == expected
    assert "images/s on all processes" in outputs[0][0]
    assert sorted(p.name for p in out.iterdir()) == [".lock", "grid.png", "run.json", "samples.npz"]


def test_what_is_there_already_is_counted_over_all_processes(model, tmp_path, monkeypatch, capsys):
    as_rank(monkeypatch, 1, 2)
    run_sample(settings(model, tmp_path))
    as_rank(monkeypatch, 0, 2)
    run_sample(settings(model, tmp_path))
    printed = capsys.readouterr().out
    assert "2 of 5 micro-batches are there already" in printed
    assert "10 images in" in printed


def test_a_guide_that_is_not_used_is_said_with_the_flag_that_uses_it(model, tmp_path, capsys):
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    guided = SFDPipeline(
        pipeline.transformer, guide=pipeline.transformer, statistics=pipeline.statistics,
        texture_codec=pipeline.texture_codec, delta_t=0.3, sampler=pipeline.sampler,
        guidance=GuidanceConfig(mode="autoguidance", scale=1.0), micro_batch_size=4, device="cpu",
    )  # fmt: skip
    guided.save_pretrained(tmp_path / "guided")
    said = "the guide is not used, as guidance is off: --guidance_mode autoguidance --guidance_scale 1.5 would use it"
    for number, (changes, line) in enumerate(
        [
            ({}, said),
            ({"guidance_scale": 1.5}, ""),
            ({"guidance_mode": "cfg", "guidance_scale": 1.5}, said.replace("guidance is off", "guidance mode is cfg")),
        ]
    ):
        run_sample(settings(tmp_path / "guided", tmp_path / str(number), num_images=4, **changes))
        printed = capsys.readouterr().out
        assert (line in printed) if line else ("the guide is not used" not in printed)


def test_other_statistics_or_another_backend_in_the_same_folder_are_an_error(model, tmp_path):
    run_sample(settings(model, tmp_path / "out"))
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    pipeline.statistics.texture_std.mul_(1.01)
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds samples of other settings: statistics is"):
        run_sample(settings(tmp_path / "other", tmp_path / "out"))
    with pytest.raises(ValueError, match="holds samples of other settings: backend is eager there and compile now"):
        run_sample(settings(model, tmp_path / "out", backend="compile"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["device"] == "cpu"


def test_a_full_disk_while_the_npz_is_gathered_names_it_and_keeps_the_parts(model, expected, tmp_path, monkeypatch):
    def full(path, *arguments):
        raise OSError(28, f"cannot write {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sample_files, "write_npz", full)
        with pytest.raises(OSError, match=r"cannot write .*samples.npz.*GiB beside its parts.*make room"):
            run_sample(settings(model, tmp_path))
    result = run_sample(settings(model, tmp_path))
    assert result.num_made == 0
    assert result.npz.read_bytes() == expected


def test_a_claim_that_is_being_written_is_read_when_it_is_whole(model, tmp_path, monkeypatch):
    whole = run_sample(settings(model, tmp_path, format="png")).out / "run.json"
    content = whole.read_text()
    whole.write_text(content[:20])
    thread = threading.Timer(0.5, whole.write_text, [content])
    thread.start()
    assert large_scale.read_claim(whole) == json.loads(content)
    thread.join()
    whole.write_text(content[:20])
    monkeypatch.setattr(large_scale, "CLAIM_S", 0.3)
    with pytest.raises(ValueError, match="run.json is damaged .*delete it to go on"):
        large_scale.read_claim(whole)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": (5,)}, "label 5 is out of range: this model has the classes 0 to 4"),
        ({"num_inference_steps": 2}, "num_inference_steps 2 is too small"),
        ({"guidance_mode": "autoguidance", "guidance_scale": 1.5}, "needs a guide model"),
        ({"model": ""}, "model is empty; give a pipeline folder"),
        ({"backend": "cuda_graph"}, "'cuda_graph' needs a CUDA device"),
    ],
)
def test_bad_settings_say_what_is_wrong(changes, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_sample(replace(settings(model, tmp_path), **changes))


def test_tasks_of_a_slurm_step_share_the_work(model, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    made = []
    for task in (1, 0):
        for name, value in (("SLURM_STEP_NUM_TASKS", 2), ("SLURM_PROCID", task), ("SLURM_LOCALID", task)):
            monkeypatch.setenv(name, str(value))
        made.append(run_sample(settings(model, tmp_path)).num_made)
    assert made == [8, 10]
    assert (tmp_path / "samples.npz").read_bytes() == expected


def test_contradictory_rank_is_an_error(model, tmp_path, monkeypatch):
    as_rank(monkeypatch, 2, 2)
    with pytest.raises(ValueError, match=r"RANK 2 must be in \[0, WORLD_SIZE = 2\)"):
        run_sample(settings(model, tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_images": -1}, r"num_images -1 must be in \[0, 100000000\]"),
        ({"num_images": 10**12}, r"num_images 1000000000000 must be in \[0, 100000000\]"),
        ({"format": "jpeg"}, "format 'jpeg' is unknown"),
        ({"num_writers": 0}, "num_writers 0 must be at least 1"),
        ({"stall_s": 0}, "stall_s 0 must be greater than 0"),
        ({"guidance_mode": "none", "guidance_scale": 2.0}, "guidance_scale 2.0 contradicts guidance_mode none"),
        ({"guidance_mode": "none", "texture_scale": 1.5}, "texture_scale 1.5 contradicts guidance_mode none"),
    ],
)
def test_bad_options_are_errors_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**changes)


def test_balanced_labels_are_of_the_classes_that_training_saw(model, tmp_path, capsys):
    pipeline = SFDPipeline.from_pretrained(model, device="cpu")
    pipeline.classes = (1, 3)
    pipeline.save_pretrained(tmp_path / "some")
    run_sample(settings(tmp_path / "some", tmp_path / "out", num_images=4, format="png"))
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [1, 3, 1, 3]
    assert "the model was trained on 2 of its 5 classes: images are drawn of these" in capsys.readouterr().out
    run_sample(settings(tmp_path / "some", tmp_path / "given", num_images=0, labels=(0, 3), format="png"))
    assert np.load(tmp_path / "given" / "labels.npy").tolist() == [0, 3]
    assert "trained on 2 of its 5 classes: labels 0 are not among them" in capsys.readouterr().out


def test_two_processes_of_one_rank_are_told_apart(tmp_path, monkeypatch):
    """Started by hand, without a launcher that gives them an address in common."""
    as_rank(monkeypatch, 1, 2)
    with (
        sample_files.occupied(tmp_path, 1, 900),
        pytest.raises(OSError, match=rf"in use by `rank 1 of sfd sample` \(process {os.getpid()} on "),
        sample_files.occupied(tmp_path, 1, 900),
    ):
        pass
    assert not (tmp_path / ".alive-1").exists()
