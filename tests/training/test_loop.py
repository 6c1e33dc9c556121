"""The training loop on a plain torch engine: learning, logs, held-out loss, and bad input."""

import errno
import json
import os
import resource
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from harness.tiny_run import MODEL, tiny_config, with_data, write_data
from harness.tiny_run import checkpoint_tensors as tensors
from safetensors.torch import load_file, save_file

from sfd_fast.config import OptimizerConfig
from sfd_fast.data.cache.shards import write_shard
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.diffusion.transport import noise
from sfd_fast.formats.released_model import load_model
from sfd_fast.planning.description import show
from sfd_fast.training.checkpoints import read_state, write_state
from sfd_fast.training.diffusion import diffusion_job, held_out_batch, initial_model, run_train, split_held_out
from sfd_fast.training.engines import interface
from sfd_fast.training.export import export_checkpoint, is_checkpoint
from sfd_fast.training.held_out import VALIDATION_IDS
from sfd_fast.training.loop import build_engine
from sfd_fast.training.optimizer import build_optimizer
from sfd_fast.training.run.log import GradNormWatch
from sfd_fast.training.run.progress import NonFiniteError
from sfd_fast.training.state import snapshot_pieces


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("latents"))


def train(config, **options):
    return run_train(config, device="cpu", progress=False, **options)


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, different


def corrupt(folder, source, value=float("nan"), rows=None):
    """A copy of the data whose texture latents hold a value that is no number, in some rows of the first shard."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    part = load_file(folder / "part0.safetensors")
    part = {k: v.clone() for k, v in part.items()}
    for key in ("latents", "latents_flip"):
        part[key][slice(None) if rows is None else rows] = value
    save_file(part, folder / "part0.safetensors")
    return folder


def test_training_lowers_the_loss_on_what_it_sees(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=150, log_every=10, checkpoint_every=150)
    config = with_data(config, validation_samples=32, flip=False)
    config = replace(config, optimizer=OptimizerConfig(lr=3e-3))
    rows = [row for row in train(config).metrics if row["kind"] == "train"]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["repa"] < 0.5 * rows[0]["repa"]


def test_same_configuration_gives_the_same_bits(tmp_path, data):
    for name, workers in (("a", 0), ("b", 3)):
        train(with_data(tiny_config(data, tmp_path / name), num_workers=workers))
    assert_same_bits(tensors(tmp_path / "a", 8), tensors(tmp_path / "b", 8))
    train(tiny_config(data, tmp_path / "c", seed=1))
    assert not torch.equal(
        tensors(tmp_path / "a", 8)["blocks.0.mlp.w3.weight|param"],
        tensors(tmp_path / "c", 8)["blocks.0.mlp.w3.weight|param"],
    )


def test_micro_batches_accumulate_to_the_same_step(tmp_path, data):
    whole = train(tiny_config(data, tmp_path / "whole", log_every=1))
    parts = train(tiny_config(data, tmp_path / "parts", log_every=1, micro_batch_size=2))
    for a, b in zip(whole.metrics, parts.metrics):
        for key in ("loss", "velocity", "cosine", "repa", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5)
        bins = [[x for x in row["loss_by_clock"] if x is not None] for row in (a, b)]
        assert bins[0] == pytest.approx(bins[1], rel=1e-5)


def test_autocast_follows_fp32(tmp_path, data):
    fp32 = train(tiny_config(data, tmp_path / "fp32"))
    for precision in ("parity", "bf16"):
        low = train(tiny_config(data, tmp_path / precision, precision=precision))
        assert low.loss == pytest.approx(fp32.loss, rel=2e-2)
        assert low.loss != fp32.loss


def test_bf16_weights_have_fp32_masters_and_fp32_norms(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", precision="bf16")
    job = diffusion_job(config)
    engine = build_engine(job, "cpu")
    batches = job.batches(0, engine)
    for _ in range(3):
        engine.train_step([next(batches)], 1e-2)
    kept = {n for n, p in job.model.named_parameters() if p.dtype == torch.float32}
    assert {"pos_embed", "blocks.0.norm1.weight", "blocks.1.attn.q_norm.weight"} <= kept
    assert not any(n.endswith(("bias", "proj.weight", "w12.weight", "embedding_table.weight")) for n in kept)
    for name, param in job.model.named_parameters():
        if name not in kept:
            master = engine.named[name]
            assert param.dtype == torch.bfloat16 and master.dtype == torch.float32
            assert torch.equal(param, master.bfloat16())
            assert not torch.equal(param.float(), master)
            assert engine.optimizer.state[master]["ema"].dtype == torch.float32


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_weights_kept_in_bf16_give_the_bits_of_autocast(tmp_path, data, micro_batches):
    """Against a loop over fp32 weights under autocast, without clipping: losses, weights and averages."""
    config = tiny_config(data, tmp_path / "run", precision="parity")
    config = replace(config, optimizer=replace(config.optimizer, max_grad_norm=0.0))
    job, plain = diffusion_job(config), diffusion_job(config)
    engine = build_engine(job, "cpu")
    low = [n for n, p in job.model.named_parameters() if p.dtype == torch.bfloat16]
    assert "blocks.0.attn.qkv.weight" in low and "blocks.0.norm1.weight" not in low
    named = {n: p for n, p in plain.model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(named.values(), config.optimizer)
    batches = job.batches(0, engine)
    for _ in range(3):
        parts = [next(batches) for _ in range(micro_batches)]
        result = engine.train_step(parts, 1e-2)
        loss = 0
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16):
                one = plain.objective(plain.model, part)[0] / micro_batches
            one.backward()
            loss = loss + one.detach()
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(result.loss, loss)
    for name, param in named.items():
        assert torch.equal(engine.named[name], param), name
        assert torch.equal(engine.export()[name], optimizer.state[param]["ema"]), name


@pytest.mark.parametrize("precision", ["parity", "bf16"])
def test_low_precision_runs_resume_to_the_same_bits(tmp_path, data, precision, monkeypatch):
    train(tiny_config(data, tmp_path / "a", precision=precision))
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        patch.setattr("sfd_fast.training.loop.Stop.requested", lambda self: next(calls) == 3)
        train(tiny_config(data, tmp_path / "b", precision=precision))
    train(tiny_config(data, tmp_path / "b", precision=precision))
    assert_same_bits(tensors(tmp_path / "a", 8), tensors(tmp_path / "b", 8))


def test_loss_scaling_needs_the_other_engine(tmp_path, data):
    with pytest.raises(ValueError, match="'fp16' needs loss scaling.*use engine 'deepspeed'"):
        train(tiny_config(data, tmp_path / "run", precision="fp16"))


def test_clipping_bounds_the_gradient_of_the_update(tmp_path, data):
    """With one step of plain statistics, exp_avg = (1 - beta1) * clipped gradient."""
    config = tiny_config(data, tmp_path / "run", max_steps=1)
    row = [r for r in train(config).metrics if r["kind"] == "train"][0]
    moments = [v for k, v in tensors(tmp_path / "run", 1).items() if k.endswith("|exp_avg")]
    norm = torch.cat([m.flatten() for m in moments]).norm() / (1 - config.optimizer.beta1)
    assert row["grad_norm"] > 1.0
    assert float(norm) == pytest.approx(config.optimizer.max_grad_norm, rel=1e-4)


def test_rows_carry_every_figure(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", validate_every=4, sample_every=8, tensorboard=True)
    result = train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics
    last = [r for r in rows if r["kind"] == "train"][-1]
    assert last["step"] == 8 and last["epoch"] == pytest.approx(8 * 8 / 32) and last["skipped"] == 0
    assert last["loss"] == pytest.approx(last["velocity"] + last["cosine"] + last["repa"], rel=1e-6)
    assert last["images_per_s"] > 0 and last["lr"] > 0 and 0 <= last["data_wait"] < 1
    assert [r["step"] for r in rows if r["kind"] == "validation"] == [4, 8]
    assert (tmp_path / "run" / "samples" / "00000008.png").stat().st_size > 0
    events = list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert events and b"train/loss" in events[0].read_bytes() and b"samples" in events[0].read_bytes()


def test_losses_by_clock_average_to_the_loss(tmp_path, data):
    """One step per row: bins hold 8 samples in all, so their weighted mean is the row's loss."""
    config = tiny_config(data, tmp_path / "run", max_steps=1, log_every=1)
    row = train(config).metrics[0]
    job = diffusion_job(config)
    batch = next(job.batches(0, build_engine(job, "cpu")))
    counts = torch.bincount(job.bins(batch), minlength=10).tolist()
    total = sum(c * m for c, m in zip(counts, row["loss_by_clock"]) if c)
    assert total / 8 == pytest.approx(row["loss"], rel=1e-5)
    assert [m is None for m in row["loss_by_clock"]] == [c == 0 for c in counts]


def test_held_out_loss_does_not_depend_on_the_batch_size(tmp_path, data):
    figures = []
    for size in (8, 3):
        config = tiny_config(data, tmp_path / "run", global_batch_size=size)
        job = diffusion_job(config)
        engine = build_engine(job, "cpu")
        figures.append(job.evaluate(engine))
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    assert figures[0]["loss"] == pytest.approx(figures[0]["loss_ema"])


def test_held_out_samples_are_never_trained_on(tmp_path, data):
    """8 of 40: after ten epochs one sample of each stretch of 5 was never seen, so every class has its share."""
    job = diffusion_job(tiny_config(data, tmp_path / "run"))
    batches = job.batches(0, build_engine(job, "cpu"))
    stored = torch.cat([load_file(data / f"part{k}.safetensors")["latents"] for k in (0, 1)])
    seen = torch.cat([next(batches)["latents"] for _ in range(40)])[:, : MODEL.texture_channels]
    both = torch.stack([stored, stored.flip(3)])
    distance = (both[:, :, None] - seen).abs().flatten(3).amax(3).amin(2).amin(0)
    assert (distance > 1e-3).view(8, 5).sum(1).tolist() == [1] * 8


def test_averaged_weights_stand_in_only_inside_their_context(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    job = diffusion_job(config)
    engine = build_engine(job, "cpu")
    batches = job.batches(0, engine)
    for _ in range(3):
        engine.train_step([next(batches)], 1e-2)
    raw = {k: v.clone() for k, v in job.model.state_dict().items()}
    with engine.ema_weights() as model:
        name = "final_layer.linear.weight"
        inside = model.state_dict()[name].clone()
    assert torch.equal(inside, engine.optimizer.state[engine.named[name]]["ema"])
    assert not torch.equal(inside, raw[name])
    assert_same_bits(raw, job.model.state_dict())


def test_exported_model_holds_the_averaged_weights(tmp_path, data):
    from sfd_fast.formats.released_model import load_model

    result = train(tiny_config(data, tmp_path / "run"))
    model = load_model(result.model)
    saved = tensors(tmp_path / "run", 8)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, param in trained.items():
        wanted = saved.get(f"{name}|ema", saved[f"{name}|param"])
        assert torch.equal(param.flatten(), wanted), name


def test_a_nan_sample_skips_its_steps_and_is_counted(tmp_path, data):
    """One bad sample of 32: each epoch of 4 steps has exactly one bad step; everything stays finite."""
    bad = corrupt(tmp_path / "bad", data, rows=3)
    result = train(tiny_config(bad, tmp_path / "run"))
    assert [r["skipped"] for r in result.metrics if r["kind"] == "train"] == [1, 2]
    messages = [r["message"] for r in result.metrics if r["kind"] == "event"]
    assert len(messages) == 2 and all("not finite: step skipped" in m for m in messages)
    assert all("part0.safetensors: the " in m and "latents of sample 3 hold NaN" in m for m in messages)
    state = tensors(tmp_path / "run", 8)
    assert all(torch.isfinite(v).all() for v in state.values())
    assert {float(v) for k, v in state.items() if k.endswith("|step")} == {6.0}


def state_of(engine):
    return {f"{p.name}|{key}": value for p in snapshot_pieces(engine.pieces()) for key, value in p.fields.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skipped_steps_leave_weights_moments_and_averages_untouched(tmp_path, data, value):
    good = tiny_config(data, tmp_path / "run", max_steps=4)
    train(good)
    job = diffusion_job(good)
    engine = build_engine(job, "cpu")
    engine.load(tmp_path / "run" / "checkpoints" / "00000004")
    before = state_of(engine)
    batch = dict(next(job.batches(4, engine)))
    batch["latents"] = torch.full_like(batch["latents"], value)
    result = engine.train_step([batch], 1e-2)
    assert float(result.skipped) == 1
    assert_same_bits(before, state_of(engine))


def test_too_many_bad_steps_stop_the_run_with_the_last_checkpoint_intact(tmp_path, data):
    out = tmp_path / "run"
    train(tiny_config(data, out, max_steps=4))
    kept = tensors(out, 4)
    bad = corrupt(tmp_path / "bad", data)
    second = load_file(bad / "part1.safetensors")
    second = {k: v * float("nan") if k.startswith("latents") else v for k, v in second.items()}
    save_file(second, bad / "part1.safetensors")
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, up to step 7, .*checkpoint is intact.*part\d.*NaN"):
        train(tiny_config(bad, out, max_steps=20, max_bad_steps=3))
    assert (out / "checkpoints" / "latest").read_text() == "00000004"
    assert_same_bits(kept, tensors(out, 4))


def test_a_spike_of_the_gradient_norm_is_noticed():
    watch = GradNormWatch(factor=10)
    assert all(watch.spike(1.0 + 0.01 * i) is None for i in range(30))
    assert watch.spike(9.0) is None
    assert watch.spike(12.0) == pytest.approx(1.15, abs=0.02)
    assert watch.spike(1.0) is None


def test_a_spike_is_said_and_kept_as_a_row(tmp_path, data):
    """One sample a million times too large, of 32: each epoch of 32 steps has one step of a huge gradient."""
    bad = corrupt(tmp_path / "bad", data, value=1e6, rows=3)
    config = tiny_config(bad, tmp_path / "run", max_steps=128, global_batch_size=1, log_every=128)
    config = with_data(config, flip=False)
    events = [row for row in train(config).metrics if row["kind"] == "event"]
    assert 3 <= len(events) <= 4  # the first 20 norms make the median, and may hold one
    assert all("is a spike: the median is" in row["message"] for row in events)


def test_disk_full_while_saving_keeps_the_previous_checkpoint(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    write = interface.write_pieces

    def full_disk(path, pieces):
        write(path, pieces)
        if "00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(interface, "write_pieces", full_disk)
    with pytest.raises(OSError, match="step 8 could not be written.*No space left.*the checkpoint of step 4 is intact"):
        train(tiny_config(data, out))
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["00000004", "latest"]
    monkeypatch.undo()
    train(tiny_config(data, out))
    train(tiny_config(data, tmp_path / "unbroken"))
    assert_same_bits(tensors(out, 8), tensors(tmp_path / "unbroken", 8))


def test_a_write_that_the_system_refuses_keeps_the_previous_checkpoint(tmp_path, data):
    """A real failed write: the process may not write files larger than 16 kB."""
    out = tmp_path / "run"
    train(tiny_config(data, out, max_steps=4))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, before[1]))
    try:
        with pytest.raises(OSError, match="step 8 could not be written.*the checkpoint of step 4 is intact"):
            train(tiny_config(data, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert train(tiny_config(data, out)).step == 8


def test_an_unwritable_directory_is_an_error_that_says_so(tmp_path, data):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file/run cannot be written.*run.out"):
        train(tiny_config(data, tmp_path / "file" / "run"))


def test_a_damaged_checkpoint_names_an_intact_one(tmp_path, data):
    out = tmp_path / "run"
    train(tiny_config(data, out))
    path = out / "checkpoints" / "00000008" / "state-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"damaged \(state-00000.safetensors has .* newest intact .* 00000004"):
        train(tiny_config(data, out, max_steps=12))
    (out / "checkpoints" / "latest").write_text("00000004")
    assert train(tiny_config(data, out, max_steps=12)).step == 12


def test_only_the_newest_checkpoints_are_kept(tmp_path, data):
    train(tiny_config(data, tmp_path / "run", checkpoint_every=2, keep_checkpoints=2))
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["00000006", "00000008", "latest"]


def test_another_configuration_cannot_resume_and_is_named(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    train(config)
    other = replace(config, optimizer=replace(config.optimizer, beta2=0.95), model=replace(MODEL, depth=3))
    with pytest.raises(ValueError, match="model.depth was 2 and is 3, optimizer.beta2 was 0.999 and is 0.95"):
        train(other)


def test_other_data_cannot_resume(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    train(config)
    other = write_data(tmp_path / "other", seed=1)
    LatentStatistics(torch.zeros(2), torch.full((2,), 2.0), torch.zeros(2), torch.ones(2)).save(other)
    with pytest.raises(ValueError, match="was trained on other data: statistics was"):
        train(with_data(replace(config, train=replace(config.train, max_steps=8)), path=str(other)))


def test_a_run_that_held_out_other_samples_is_not_continued(tmp_path, data):
    """What it validates on would have been trained on."""
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    train(config)
    folder = tmp_path / "run" / "checkpoints" / "00000004"
    state = read_state(folder)
    state["identity"].pop("held_out")
    write_state(folder, state)
    with pytest.raises(ValueError, match="held_out was None and is spread over the set .versions before held out"):
        train(replace(config, train=replace(config.train, max_steps=5)))


def test_held_out_moments_are_sampled_at_fixed_noise(tmp_path):
    """As training samples them; means alone would be easier data."""
    generator = torch.Generator().manual_seed(0)
    texture, logvar, semantic = (torch.randn(10, 2, 4, 4, generator=generator) for _ in range(3))
    rows = {"latents_mean": texture, "latents_logvar": logvar, "latents_sv": semantic, "labels": torch.arange(10) % 5}
    write_shard(tmp_path / "data" / "a.safetensors", rows)
    statistics = LatentStatistics(torch.ones(2), torch.full((2,), 2.0), torch.zeros(2), torch.ones(2))
    statistics.save(tmp_path / "data")
    config = with_data(tiny_config(tmp_path / "data", tmp_path / "run"), flip=False, validation_samples=2)
    config = replace(config, transport=replace(config.transport, repa_weight=0.0))
    shards, held_out = split_held_out(config)
    engine = build_engine(diffusion_job(config), "cpu")
    batch = held_out_batch(engine, config, held_out, statistics, torch.tensor([1, 0]), None)
    numbers, ids = held_out.numbers(torch.tensor([1, 0])), torch.tensor([1, 0]) + VALIDATION_IDS
    eps = noise(ids, (2, 4, 4), config.train.seed, random_numbers.TEXTURE_POSTERIOR)
    sampled = (texture[numbers] + torch.exp(logvar[numbers] / 2) * eps - 1) / 2
    torch.testing.assert_close(batch["latents"], torch.cat([sampled, semantic[numbers]], dim=1))


def test_an_existing_run_is_not_overwritten(tmp_path, data):
    train(tiny_config(data, tmp_path / "run"))
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny_config(data, tmp_path / "run"), resume=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texture_channels": 3}, "has 2 texture channels, model.texture_channels is 3: set it to 2"),
        ({"grid_size": 8}, "latents of 4 x 4, model.grid_size is 8"),
        ({"repa_channels": 16}, "VFM features .*are 4 tokens of width 8; the REPA head .*repa_channels = 16"),
        ({"num_classes": 3}, "has label 4, but model.num_classes is 3"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(tmp_path, data, change, message):
    config = replace(tiny_config(data, tmp_path / "run"), model=replace(MODEL, **change))
    with pytest.raises(ValueError, match=message):
        train(config)


def test_missing_data_and_empty_training_sets_are_refused(tmp_path, data):
    config = tiny_config(data, tmp_path / "run")
    with pytest.raises(ValueError, match="data.path is empty"):
        train(with_data(config, path=""))
    with pytest.raises(ValueError, match="validation_samples 40 leaves nothing of the 40 samples"):
        train(with_data(config, validation_samples=40))


def test_fine_tuning_starts_from_the_given_weights(tmp_path, data):
    first = train(tiny_config(data, tmp_path / "first"))
    config = tiny_config(data, tmp_path / "second", init_from=str(first.model), max_steps=1, log_every=1)
    config = replace(config, optimizer=OptimizerConfig(lr=1e-12))
    train(config)
    source, target = tensors(tmp_path / "first", 8), tensors(tmp_path / "second", 1)
    name = "blocks.1.attn.qkv.weight"
    torch.testing.assert_close(target[f"{name}|param"], source[f"{name}|ema"], rtol=0, atol=1e-8)


def test_a_run_directory_or_a_pipeline_may_be_given_and_a_checkpoint_names_the_command(tmp_path, data):
    first = train(tiny_config(data, tmp_path / "first"))
    config = tiny_config(data, tmp_path / "second", init_from=str(first.directory))
    expected = load_model(first.model).state_dict()
    found = initial_model(config).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    shutil.copytree(first.model, tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "pipeline.json").write_text("{}")
    found = initial_model(tiny_config(data, tmp_path / "third", init_from=str(tmp_path / "pipeline"))).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for part in ("checkpoints", "checkpoints/00000008"):
        place = first.directory / part
        with pytest.raises(ValueError, match=f"is a training checkpoint, .*sfd convert --source {place} --target"):
            initial_model(tiny_config(data, tmp_path / "fourth", init_from=str(place)))


def test_weights_of_another_size_cannot_start_a_run(tmp_path, data):
    first = train(tiny_config(data, tmp_path / "first"))
    config = tiny_config(data, tmp_path / "second", init_from=str(first.model))
    with pytest.raises(ValueError, match="do not fit the model: .* tensors differ.*choose the model"):
        train(replace(config, model=replace(MODEL, depth=3)))


def test_new_classes_keep_only_the_null_row(tmp_path, data):
    first = train(tiny_config(data, tmp_path / "first"))
    settings = {"init_from": str(first.model), "max_steps": 1, "log_every": 1}
    other = replace(MODEL, num_classes=7)
    with pytest.raises(ValueError, match="1 tensors differ.*train.init_classes 'new'"):
        train(replace(tiny_config(data, tmp_path / "a", **settings), model=other))
    config = replace(tiny_config(data, tmp_path / "b", init_classes="new", **settings), model=other)
    train(replace(config, optimizer=OptimizerConfig(lr=1e-12)))
    table = "y_embedder.embedding_table.weight"
    ours = tensors(tmp_path / "b", 1)[f"{table}|param"].view(8, -1)
    theirs = tensors(tmp_path / "first", 8)[f"{table}|ema"].view(6, -1)
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=0, atol=1e-8)
    assert (ours[:5] - theirs[:5]).abs().max() > 1e-3


def test_a_checkpoint_exports_averages_or_weights(tmp_path, data):
    from sfd_fast.formats.model_folder import read_config, read_description, read_statistics
    from sfd_fast.formats.released_model import load_model

    config = tiny_config(data, tmp_path / "run")
    config = replace(config, optimizer=replace(config.optimizer, extra_ema_decays=(0.5,)))
    result = train(config)
    assert is_checkpoint(tmp_path / "run") and not is_checkpoint(data)
    export_checkpoint(tmp_path / "run", tmp_path / "ema")
    assert_same_bits(load_model(tmp_path / "ema").state_dict(), load_model(result.model).state_dict())
    assert read_config(tmp_path / "ema") == config and read_description(tmp_path / "ema")[1]["card"]["step"] == 8
    assert torch.equal(read_statistics(tmp_path / "ema").texture_std, torch.ones(2))
    saved = tensors(tmp_path / "run", 8)
    name = "blocks.0.mlp.w3.weight"
    for weights, key in (("model", f"{name}|param"), ("ema_1", f"{name}|ema_1")):
        export_checkpoint(tmp_path / "run" / "checkpoints" / "00000008", tmp_path / weights, weights=weights)
        assert torch.equal(load_model(tmp_path / weights).state_dict()[name].flatten(), saved[key])
    with pytest.raises(ValueError, match="has no 'ema_7'; it has ema, ema_1, exp_avg, exp_avg_sq, param"):
        export_checkpoint(tmp_path / "run", tmp_path / "none", weights="ema_7")
    with pytest.raises(ValueError, match="is no intact training checkpoint"):
        export_checkpoint(data, tmp_path / "none")


def test_a_dry_run_shows_everything_and_trains_nothing(tmp_path, data, capsys):
    config = tiny_config(data, tmp_path / "run", engine="deepspeed", precision="parity")
    show(diffusion_job(config))
    shown = capsys.readouterr().out
    parts = ['"hidden_size": 32', "8 steps of 8", "learning rate:", '"torch_autocast"', "reduce_bucket_size", "GiB"]
    for part in parts:
        assert part in shown
    assert not (tmp_path / "run").exists()


def test_a_profile_records_the_asked_steps(tmp_path, data):
    train(tiny_config(data, tmp_path / "run", profile_start=2, profile_steps=2, peak_tflops=1.0))
    trace = json.loads((tmp_path / "run" / "profile" / "rank0.json").read_text())
    ranges = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    assert ranges.count("step") == 2 and ranges.count("data") == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["mfu"] == pytest.approx(rows[0]["tflops"])


def test_several_ranks_need_the_deepspeed_engine(tmp_path, data, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, but 2 ranks were launched; set train.engine to 'deepspeed'"):
        train(tiny_config(data, tmp_path / "run"))


def test_validation_leaves_training_mode_and_weights_alone(tmp_path, data):
    config = tiny_config(data, tmp_path / "run")
    job = diffusion_job(config)
    engine = build_engine(job, "cpu")
    before = {k: v.clone() for k, v in job.model.state_dict().items()}
    assert job.evaluate(engine)["loss"] > 0
    assert job.samples(engine).dtype == torch.uint8
    assert job.model.training
    assert_same_bits(before, job.model.state_dict())


def test_new_classes_of_a_network_without_a_null_class_are_all_new(tmp_path, data):
    first = train(tiny_config(data, tmp_path / "first"))
    settings = {"init_from": str(first.model), "init_classes": "new", "max_steps": 1, "log_every": 1}
    other = replace(MODEL, num_classes=7, class_dropout=0.0)
    train(replace(tiny_config(data, tmp_path / "a", **settings), model=other))
    assert tensors(tmp_path / "a", 1)["y_embedder.embedding_table.weight|param"].view(7, -1).shape[0] == 7


def test_latents_that_are_not_standardised_need_no_statistics(tmp_path):
    from sfd_fast.formats.model_folder import read_statistics

    config = with_data(tiny_config(write_data(tmp_path / "data"), tmp_path / "run", max_steps=2, log_every=1),
                       normalise_texture=False, normalise_semantic=False, latent_multiplier=0.5)  # fmt: skip
    for path in (tmp_path / "data").glob("*_stats.pt"):
        path.unlink()
    statistics = read_statistics(train(config).model)
    assert statistics.multiplier == 0.5 and torch.equal(statistics.texture_std, torch.ones(2))
    assert torch.equal(statistics.semantic_mean, torch.zeros(2))
