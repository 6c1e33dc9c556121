"""The engine of one process inside the loop: closed whatever happens, told of progress, started from given weights."""

import json
import time
from dataclasses import replace

import pytest
import torch
from harness.tiny_run import MODEL, tiny_config, write_data

from sfd_fast.config import DeepSpeedConfig
from sfd_fast.formats.released_model import write_released_dit
from sfd_fast.models.dit import LightningDiT
from sfd_fast.planning.description import show
from sfd_fast.training.diffusion import diffusion_job, initial_model, run_train
from sfd_fast.training.engines import watchdog as watchdog_module
from sfd_fast.training.engines.torch import TorchEngine
from sfd_fast.training.engines.watchdog import Watchdog
from sfd_fast.training.loop import Stop
from sfd_fast.training.run.log import StepLog


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("latents"))


def train(config, **options):
    return run_train(config, device="cpu", progress=False, **options)


@pytest.fixture
def closed(monkeypatch):
    """Counts engines that were closed."""
    count = []
    monkeypatch.setattr(TorchEngine, "close", lambda self: count.append(1))
    return count


def test_a_run_that_is_refused_closes_its_engine(tmp_path, data, closed):
    """Else its watchdog would end the process of a notebook half an hour later."""
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    train(config)
    assert len(closed) == 1
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(config, model=replace(MODEL, depth=3)))
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, resume=False)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot be written"):
        train(tiny_config(data, tmp_path / "file" / "run"))
    assert len(closed) == 4


def test_a_refused_configuration_leaves_the_files_of_the_run_alone(tmp_path, data, monkeypatch):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    monkeypatch.setattr(TorchEngine, "files", lambda self: {"engine.json": "first"})
    train(config)
    monkeypatch.setattr(TorchEngine, "files", lambda self: {"engine.json": "second"})
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(config, model=replace(MODEL, depth=3)))
    assert (tmp_path / "run" / "engine.json").read_text() == "first"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["depth"] == 2
    train(replace(config, train=replace(config.train, max_steps=5)))
    assert (tmp_path / "run" / "engine.json").read_text() == "second"


def test_steps_are_read_before_anything_that_pauses_the_clock(tmp_path, data, monkeypatch):
    """Reading waits for the device: what is queued there is training, and not part of the pause."""
    filled = []

    def watched(self, *arguments):
        filled.append(self.run_log.filled)
        return evaluate(self, *arguments)

    evaluate, init = TorchEngine.evaluate, StepLog.__init__

    def remember(self, *arguments, **options):
        init(self, *arguments, **options)
        TorchEngine.run_log = self

    monkeypatch.setattr(StepLog, "__init__", remember)
    monkeypatch.setattr(TorchEngine, "run_log", None, raising=False)
    monkeypatch.setattr(TorchEngine, "evaluate", watched)
    train(tiny_config(data, tmp_path / "run", log_every=8, validate_every=3))
    assert filled and set(filled) == {0}


def test_sampling_tells_of_its_progress(tmp_path, data, monkeypatch):
    beats = []
    monkeypatch.setattr(TorchEngine, "beat", lambda self: beats.append(1))
    config = tiny_config(data, tmp_path / "run", sample_every=8)
    train(config)
    assert len(beats) >= config.sampler.num_inference_steps


def test_a_watchdog_watches_from_the_first_beat_until_it_is_stopped(monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog_module.os, "_exit", ended.append)
    idle, stopped, hanging = (Watchdog(0, 0.2) for _ in range(3))
    stopped.beat()
    stopped.stop()
    time.sleep(0.5)
    assert not ended and idle.thread is None
    hanging.beat()
    time.sleep(0.6)
    hanging.stop()
    assert ended and set(ended) == {1}


def test_only_the_rank_that_looks_sees_the_stop_file(tmp_path):
    (tmp_path / "STOP").touch()
    assert Stop(tmp_path).requested() and not Stop(tmp_path, look=False).requested()


def test_half_of_the_blocks_recomputed_gives_the_same_losses(tmp_path, data):
    losses = {}
    for share in (0.0, 0.5, 1.0):
        config = tiny_config(data, tmp_path / str(share), log_every=1, max_steps=4, checkpoint_activations=share)
        losses[share] = [row["loss"] for row in train(config).metrics]
    assert losses[0.5] == losses[0.0] == losses[1.0]


def test_a_run_starts_from_a_released_file(tmp_path, data):
    """A .pt with the released keys: fine-tuning begins at its averages, not at its raw weights."""
    torch.manual_seed(1)
    average = {k: v + 0.1 * torch.randn_like(v) for k, v in LightningDiT(MODEL).state_dict().items()}
    average |= {k: v for k, v in LightningDiT(MODEL).state_dict().items() if k == "pos_embed" or "freqs" in k}
    config = tiny_config(data, tmp_path / "run", init_from=str(tmp_path / "0400000.pt"))
    raw = {k: torch.zeros_like(v) for k, v in average.items()}
    write_released_dit(tmp_path / "0400000.pt", config, raw=raw, average=average)
    started = initial_model(config).state_dict()
    assert started.keys() == average.keys()
    assert all(torch.equal(started[key], average[key]) for key in average)
    assert train(config).step == 8


def test_seconds_of_training_go_on_after_a_stop(tmp_path, data, monkeypatch):
    config = tiny_config(data, tmp_path / "run", log_every=1)
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        patch.setattr(Stop, "requested", lambda self: next(calls) == 4)
        train(config)
    state = json.loads((tmp_path / "run" / "checkpoints" / "00000004" / "state.json").read_text())
    assert state["wall_s"] > 0
    walls = [row["wall_s"] for row in train(config).metrics if row["kind"] == "train"]
    assert walls == sorted(walls) and walls[4] > state["wall_s"] >= walls[3]


def test_a_dry_run_refuses_what_the_run_would_and_counts_overridden_buckets(tmp_path, data, monkeypatch, capsys):
    config = tiny_config(data, tmp_path / "run", engine="deepspeed")
    path = tmp_path / "overrides.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 500_000_000}}))

    def buffers(made):
        show(diffusion_job(made))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  buffers "))
        return float(line.split()[1])

    usual = buffers(config)
    settings = DeepSpeedConfig(zero_stage=config.deepspeed.zero_stage, config_file=str(path))
    # two buckets of fp32 elements
    assert buffers(replace(config, deepspeed=settings)) - usual == pytest.approx(2 * 4 * 450e6 / 2**30, abs=2e-3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    show(diffusion_job(config))
    assert not capsys.readouterr().out  # rank 0 prints for all
    with pytest.raises(ValueError, match="one process, but 2 ranks were launched"):
        show(diffusion_job(replace(config, train=replace(config.train, engine="torch"))))
    assert diffusion_job(config).notes == ()
