"""The DeepSpeed engine on one and two gloo ranks; three launches run all cases (see deepspeed_ranks.py)."""

import importlib.util
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness.deepspeed_ranks import FOOTPRINTS
from harness.tiny_run import pixels, tiny_config, write_data, write_reference
from PIL import Image
from safetensors.torch import load_file

from sfd_fast import cli
from sfd_fast.training.diffusion import diffusion_job, run_train
from sfd_fast.training.engines import deepspeed as engine_module
from sfd_fast.training.state import consolidated

HARNESS = Path(__file__).resolve().parents[2] / "harness"
ABSENT = "deepspeed is not installed: DS_BUILD_OPS=0 pip install deepspeed==0.19.8"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason=ABSENT)

FIELDS = ("param", "exp_avg", "exp_avg_sq", "ema", "ema_1")
"""what a checkpoint holds of a parameter, element by element"""
TWO_RANKS = (
    "stages", "resume", "shares", "precision", "bad_batch", "averages", "pre_emption", "host_reads", "options", "two",
    "from_one", "contradictions", "disk_full", "footprint", "judged", "bad_after_resume",
)  # fmt: skip


def environment(**extra):
    path = os.pathsep.join([str(HARNESS.parent), *filter(None, sys.path)])
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path} | extra


def start_ranks(world_size, folder, *cases):
    """The ranks of a plain launch, each in a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(world_size):
        # not a pipe: a rank would wait for its reader once that is full; `said` closes it
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(HARNESS / "deepspeed_ranks.py"), str(folder), *cases],
                env=environment(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                ),
                stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )
        )  # fmt: skip
        ranks[-1].errors = errors
    return ranks


def said(rank):
    """What a rank wrote to stderr."""
    with rank.errors as errors:
        errors.seek(0)
        return errors.read()


def finish(ranks, timeout_s=200):
    """(exit code, stderr, time of its end) of every rank; none is left running."""
    ends, deadline = {}, time.time() + timeout_s
    try:
        while len(ends) < len(ranks) and time.time() < deadline:
            ends |= {rank.pid: time.time() for rank in ranks if rank.pid not in ends and rank.poll() is not None}
            time.sleep(0.05)
        return [(rank.wait(1), said(rank), ends[rank.pid]) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)


def launcher(folder, *cases):
    """The same under the deepspeed launcher, as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", port]
    program = subprocess.run(
        [*command, str(HARNESS / "deepspeed_ranks.py"), str(folder), *cases],
        env=environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert program.returncode == 0, program.stderr[-6000:]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All cases of one and two ranks: {case: [result of rank 0, result of rank 1]}; the folder is ran.folder."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip(ABSENT)
    folder = tmp_path_factory.mktemp("ranks")
    write_data(folder / "data")
    write_data(folder / "other", seed=1)
    write_reference(folder / "reference.npz")
    for code, error, _ in finish(start_ranks(1, folder, "one", "fp16", "shares_of_one")):
        assert code == 0, error[-6000:]
    launcher(folder, *TWO_RANKS)
    for code, error, _ in finish(start_ranks(1, folder, "from_two")):
        assert code == 0, error[-6000:]

    class Ran(dict):
        pass

    results = Ran()
    for path in folder.glob("*.json"):
        name, rank, *rest = path.name.split(".")
        if rest == ["json"] and name != "deepspeed":
            results.setdefault(name, {})[int(rank)] = json.loads(path.read_text())["result"]
    results.folder = folder
    return results


@pytest.fixture(scope="module")
def alone(ran):
    """Losses and held-out figures of one plain torch process with the same global batch."""
    settings = {"max_steps": 30, "log_every": 1, "validate_every": 15, "sample_every": 30, "num_sample_images": 5}
    config = tiny_config(ran.folder / "data", ran.folder / "alone", micro_batch_size=4, **settings)
    rows = run_train(config, device="cpu", progress=False).metrics
    return [r["loss"] for r in rows if r["kind"] == "train"], [r for r in rows if r["kind"] == "validation"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_follow_one_process(ran, alone, stage):
    """30 steps with clipping, a cosine schedule and accumulation; micro-batches of 2 on two ranks against 4 on one."""
    result = ran["stages"][0][str(stage)]
    assert len(result["losses"]) == 30
    assert result["losses"] == pytest.approx(alone[0], rel=1e-5)
    for mine, theirs in zip(result["validation"], alone[1], strict=True):
        for key in ("loss", "loss_ema", "velocity_ema"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5)


@pytest.mark.parametrize("kind", ["0-fp32", "1-bf16", "2-parity", "3-fp32", "3-bf16"])
def test_a_run_stopped_twice_ends_with_the_same_bits(ran, kind):
    folders = [ran.folder / f"resume-{kind}-{name}" / "checkpoints" / "00000008" for name in ("unbroken", "broken")]
    names = sorted(path.name for path in folders[0].glob("state-*.safetensors"))
    assert names == ["state-00000.safetensors", "state-00001.safetensors"]
    for name in names:
        a, b = (load_file(folder / name) for folder in folders)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    exported = [load_file(folder.parents[1] / "model" / "model.safetensors") for folder in folders]
    assert all(torch.equal(exported[0][key], exported[1][key]) for key in exported[0])


def test_losses_by_clock_of_both_ranks_survive_stops_between_rows(ran):
    unbroken, broken = ran["resume"][0]["2-parity"]
    assert [row["step"] for row in broken] == [row["step"] for row in unbroken] == [4, 8]
    for mine, theirs in zip(broken, unbroken):
        for key in ("loss", "velocity", "cosine", "repa", "grad_norm", "skipped"):
            assert mine[key] == theirs[key]
        bins = [[m is None for m in row["loss_by_clock"]] for row in (mine, theirs)]
        means = [[m for m in row["loss_by_clock"] if m is not None] for row in (mine, theirs)]
        assert bins[0] == bins[1] and means[0] == pytest.approx(means[1], rel=1e-5)
        assert mine["memory_gib"] > 0.1


def test_parity_precision_follows_the_plain_engine(ran, tmp_path):
    """bf16 autocast rounds products of 4 and of 8 samples alike but for a few last bits."""
    config = tiny_config(ran.folder / "data", tmp_path / "run", precision="parity")
    alone = [row for row in run_train(config, device="cpu", progress=False).metrics if row["kind"] == "train"]
    for mine, theirs in zip(ran["resume"][0]["2-parity"][0], alone, strict=True):
        for key in ("loss", "velocity", "cosine", "repa", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-3)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_fp16_looks_for_its_loss_scale_without_counting_bad_steps(ran, alone, stage):
    """Overflows in a row, more than train.max_bad_steps = 3, and then the losses of fp32 as many steps behind."""
    found = ran["fp16"][0][stage]
    overflows = [event for event in found["events"] if "gradients overflow fp16 at this loss scale" in event]
    assert len(overflows) == len(found["events"]) == found["skipped"] > 3
    losses = [loss for loss in found["losses"] if loss is not None]
    assert losses[-1] < losses[0] and len(losses) == 16 - len(overflows) >= 4


@pytest.mark.parametrize("stage", [2, 3])
def test_sample_grids_of_two_ranks_are_those_of_one(ran, alone, stage):
    """Five images on two ranks: each draws three, one of them in vain."""
    mine, theirs = (
        np.asarray(Image.open(ran.folder / name / "samples" / "00000030.png")).astype(int)
        for name in (f"stages-{stage}", "alone")
    )
    assert mine.shape == theirs.shape and theirs.std() > 10
    assert abs(mine - theirs).max() <= 1


def test_zero_3_holds_half_on_each_of_two_ranks(ran):
    """Of what the same engine holds on one rank, gradients that DeepSpeed never gives back included."""
    alone = ran["shares_of_one"][0]
    for rank in (0, 1):
        measured = ran["shares"][rank]
        assert sum(measured.values()) <= 0.52 * sum(alone.values())
        for part in ("parameters", "gradients", "moments and average"):
            assert 0.49 <= measured[part] / alone[part] <= 0.52


@pytest.mark.parametrize("number", range(len(FOOTPRINTS)), ids=[str(way) for way in FOOTPRINTS])
def test_the_planner_predicts_the_memory_of_two_ranks_within_a_tenth(ran, number):
    for rank in (0, 1):
        assert FOOTPRINTS[number].predicted() == pytest.approx(ran["footprint"][rank][number], rel=0.1)


def test_norms_positions_and_clocks_stay_fp32_with_bf16_weights(ran):
    seen = ran["precision"][0]
    assert seen["clocks"] == ["torch.float32"] and seen["loss"] == "torch.float32"
    assert seen["sharded"] == ["torch.bfloat16"] and seen["masters"] == ["torch.float32"]
    assert set(seen["kept"].values()) == {"torch.float32"}
    assert {"pos_embed", "blocks.0.norm1.weight", "blocks.1.attn.k_norm.weight"} <= set(seen["kept"])


@pytest.mark.parametrize("kind", ["0-fp32", "2-fp32", "1-bf16", "3-bf16"])
def test_a_nan_batch_on_one_rank_skips_the_step_on_all(ran, kind):
    for rank in (0, 1):
        assert ran["bad_batch"][rank][kind] == {"skipped": 1.0, "same": True, "next": 0.0, "moved": True}


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_bad_step_right_after_a_resume_under_zero_3_ends_with_the_bits_of_an_unbroken_run(ran, kind):
    for rank in (0, 1):
        found = ran["bad_after_resume"][rank][kind]
        assert found["skipped"] == [0, 0, 1, 0, 0] and found["same"] and found["fields"] > 100


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_averages_are_used_inside_their_context_and_leave_no_trace(ran, stage):
    result = ran["averages"][0][stage]
    assert result["same"] and ran["averages"][1][stage]["same"]
    assert result["first"] == result["second"]
    assert result["first"]["loss"] != result["first"]["loss_ema"]
    assert result["exported"] == pytest.approx(result["first"]["loss_ema"], rel=1e-5)


def test_two_ranks_judge_generated_images_as_one_process_does(ran, tmp_path):
    settings = {"max_steps": 4, "micro_batch_size": 4, "eval_every": 4, "eval_images": 21, "eval_features": "digits"}
    config = tiny_config(
        ran.folder / "data", tmp_path / "alone", eval_reference=str(ran.folder / "reference.npz"), **settings
    )
    rows = run_train(config, device="cpu", progress=False, decode=pixels).metrics
    [alone] = [row for row in rows if row["kind"] == "evaluation"]
    [two] = ran["judged"][0]
    assert two.pop("kind") == alone.pop("kind")
    assert two == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("cause", ["SIGTERM", "SIGUSR1", "STOP"])
def test_a_signal_to_one_rank_or_the_stop_file_stops_all_at_one_step(ran, cause):
    first, second = (ran["pre_emption"][rank][cause] for rank in (0, 1))
    assert first["exit_code"] == second["exit_code"] == 75
    assert first["step"] == second["step"] < 400
    latest = ran.folder / f"pre-emption-{cause}" / "checkpoints" / "latest"
    assert int(latest.read_text()) == first["step"]
    # rank 0 looks for the file, and hears of a signal to rank 1 from there
    assert f"stopped by {'the file STOP' if cause == 'STOP' else 'another rank'}; saved" in first["said"][-1]


def test_our_code_reads_nothing_from_the_device_during_a_step(ran, record_testsuite_property):
    """DeepSpeed's own reads are counted too, so the counter is known to work: 1 a step, and 2 under ZeRO 2."""
    for name, found in ran["host_reads"][0].items():
        print(f"host reads in a step, {name}: {found}")
        record_testsuite_property(f"host reads, {name}", found)
        assert set(found) == {"deepspeed"} and 1 <= found["deepspeed"] <= 2


@pytest.mark.parametrize(
    ("option", "plain"), [("offload-2", "plain-2"), ("offload-3", "plain-3"), ("checkpointing-3", "plain-3")]
)
def test_offload_and_recomputation_leave_the_losses_as_they_are(ran, option, plain):
    assert ran["options"][0][option] == pytest.approx(ran["options"][0][plain], rel=1e-6)


def test_one_rank_to_two_moves_every_average_exactly(ran):
    """Every element of weight, moments and average, under ZeRO 1, 2 and 3, equals what one rank saved."""
    total = sum(v.numel() for v in consolidated(ran.folder / "one" / "checkpoints" / "00000004").values())
    for rank in (0, 1):
        assert ran["from_one"][rank]["worst"] == dict.fromkeys(FIELDS, 0)
    for field in FIELDS:
        assert sum(ran["from_one"][rank]["covered"][field] for rank in (0, 1)) == 3 * total


def test_one_rank_to_two_goes_on_as_one_would(ran):
    """From step 4 of one rank under ZeRO 1 to step 8 of two under ZeRO 2."""
    assert ran["from_one"][0]["losses"] == pytest.approx(ran["one"][0]["losses"][4:], rel=1e-5)
    folders = [ran.folder / name / "checkpoints" / "00000008" for name in ("one", "one-by-two")]
    assert_same_state(*folders)


def assert_same_state(a, b):
    """Weights, moments and both averages of two checkpoints, to rounding."""
    for field in FIELDS:
        mine, theirs = consolidated(a, field), consolidated(b, field)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6)


def test_two_ranks_to_one_moves_every_average_exactly_and_ends_alike(ran):
    moved = ran["from_two"][0]
    folder = ran.folder / "two-unbroken" / "checkpoints" / "00000008"
    assert moved["ranks"] == 2
    assert moved["worst"] == dict.fromkeys(FIELDS, 0)
    for average in ("ema", "ema_1"):
        assert moved["covered"][average] == sum(v.numel() for v in consolidated(folder, average).values())
    assert any("saved by 2 ranks, resumed by 1" in event for event in moved["events"])
    assert moved["losses"] == pytest.approx(ran["two"][0]["losses"], rel=1e-5)  # the first four are two ranks' own
    assert_same_state(ran.folder / "two" / "checkpoints" / "00000008", folder)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_converts_to_the_averages_it_trained(ran, tmp_path, stage):
    run = ran.folder / f"stages-{stage}"
    cli.main(["convert", "--source", str(run), "--target", str(tmp_path / "folder")])
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "folder", run / "model"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    cli.main(["convert", "--source", str(run), "--target", str(tmp_path / "released.pt")])
    released = torch.load(tmp_path / "released.pt", weights_only=False)
    assert all(torch.equal(released["ema"][key], b[key]) for key in b)
    weights = consolidated(run / "checkpoints" / "00000030", "param")
    assert all(torch.equal(released["model"][key].flatten(), weights[key]) for key in weights)


def test_one_plain_process_goes_on_from_two_ranks(ran, tmp_path):
    """The torch engine reads what two ranks of ZeRO 3 saved at step 4 and ends where they did, to rounding."""
    target = tmp_path / "run" / "checkpoints"
    target.mkdir(parents=True)
    (target / "00000004").symlink_to(ran.folder / "two" / "checkpoints" / "00000004")
    (target / "latest").write_text("00000004")
    config = tiny_config(ran.folder / "data", tmp_path / "run", max_steps=8, log_every=1)
    averages = replace(config.optimizer, extra_ema_decays=(0.5,), ema_warmup=True)
    result = run_train(replace(config, optimizer=averages), device="cpu", progress=False)
    losses = [row["loss"] for row in result.metrics if row["kind"] == "train"]
    assert losses == pytest.approx(ran["two"][0]["losses"][4:], rel=1e-5)
    assert_same_state(target / "00000008", ran.folder / "two-unbroken" / "checkpoints" / "00000008")
    assert any("saved by 2 ranks, resumed by 1" in r["message"] for r in result.metrics if r["kind"] == "event")


def test_a_rank_that_cannot_write_stops_all_with_the_old_checkpoint(ran):
    messages = [ran["disk_full"][rank] for rank in (0, 1)]
    assert "rank 1 could not write its part" in messages[0] and "the checkpoint of step 2 is intact" in messages[0]
    assert "No space left on device" in messages[1]
    assert (ran.folder / "disk-full" / "checkpoints" / "latest").read_text() == "00000002"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("world size", "global_batch_size 9 must be a multiple of the 2 ranks; use 8 or 10"),
        ("micro batch", "each of 2 ranks takes 6 .*micro_batch_size 4 does not divide; use one of .1, 2, 3, 6."),
        ("stage", "'bf16' keeps fp32 masters in ZeRO's optimizer, but deepspeed.zero_stage is 0"),
        ("optimizer", "optimizer.name is 'torch_fused', but train.engine 'deepspeed' shards the averages"),
        ("file", "sets gradient_clipping to 1.0, which contradicts optimizer.max_grad_norm"),
        ("preset", "belongs to another configuration: model.depth was 2 and is 3"),
        ("different disks", "ranks see different checkpoints .*: of steps 0 to 8, this rank .* all nodes share"),
        ("other settings", "rank 1 was started otherwise .*: optimizer.lr is 0.001 on rank 0 and 0.0005 on rank 1"),
        ("other seed", "rank 1 was started otherwise than rank 0: train.seed is 0 on rank 0 and 1 on rank 1"),
        ("other data", "rank 1 was started otherwise than rank 0: data is .*samples"),
        ("unwritable", "in-the-way/run cannot be written|another rank could not take .*in-the-way/run"),
    ],
)
def test_contradictions_are_errors_on_every_rank(ran, what, message):
    for rank in (0, 1):
        assert re.search(message, ran["contradictions"][rank][what])


def test_refused_runs_leave_neither_watchdogs_nor_another_json(ran):
    for rank in (0, 1):
        assert ran["contradictions"][rank]["watchdogs"] == "0"
        assert ran["contradictions"][rank]["json as before"] == "True"


def test_the_generated_json_is_kept_in_the_run_directory(ran):
    kept = json.loads((ran.folder / "stages-3" / "deepspeed.json").read_text())
    assert kept["zero_optimization"]["stage"] == 3
    assert kept["zero_optimization"]["stage3_param_persistence_threshold"] == 100
    assert kept["gradient_accumulation_steps"] == 2 and kept["train_batch_size"] == 8


@needs_deepspeed
def test_a_rank_that_dies_ends_the_others_with_a_clear_error(tmp_path):
    write_data(tmp_path / "data")
    (code, error, end), (killed, _, death) = finish(start_ranks(2, tmp_path, "dies"), 120)
    assert killed == -signal.SIGKILL and code == 1
    assert end - death < 60  # deepspeed.timeout_s of this run
    assert "rank 0 of 2 has lost another rank: it died, or did not answer" in error


@needs_deepspeed
def test_a_rank_that_hangs_ends_all_with_a_clear_error(tmp_path):
    write_data(tmp_path / "data")
    ended = finish(start_ranks(2, tmp_path, "hangs"), 120)
    start = float((tmp_path / "hangs-from").read_text())
    for rank, (code, error, end) in enumerate(ended):
        assert code == 1
        # timeout_s is 4; the watchdog looks ten times as often, and the interpreter ends within seconds
        assert 0 < end - start < 4 + 10
        assert f"rank {rank}: no step for 4 s" in error or "has lost another rank" in error
    assert "time.sleep" in ended[1][1] or "__iter__" in ended[1][1]


def test_the_device_is_chosen_before_deepspeed_is_initialised(monkeypatch, tmp_path):
    """srun --gpus-per-task=1 shows each rank one device, number 0, whatever its place on the node."""

    class Met(Exception):
        pass

    class Library:
        utils = SimpleNamespace(logger=logging.getLogger("not-deepspeed"))

        def init_distributed(self, **options):
            raise Met(options["dist_backend"], os.environ["LOCAL_RANK"], list(current))

    current = []
    for name, value in (("RANK", 3), ("LOCAL_RANK", 3), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(engine_module, "load_deepspeed", lambda kind: Library())
    write_data(tmp_path / "data")
    job = diffusion_job(tiny_config(tmp_path / "data", tmp_path / "run", engine="deepspeed", global_batch_size=8))
    with pytest.raises(Met) as met:
        engine_module.DeepSpeedEngine(job)
    assert met.value.args == ("nccl", "0", [0])


def test_deepspeed_absent_is_an_error_with_the_install_command(tmp_path, monkeypatch):
    write_data(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="needs the package deepspeed.*DS_BUILD_OPS=0 pip install deepspeed==0.19.8"):
        run_train(tiny_config(tmp_path / "data", tmp_path / "run", engine="deepspeed"), device="cpu", progress=False)
