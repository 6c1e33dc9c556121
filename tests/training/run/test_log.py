"""What a run reports: sums over ranks, bad steps, memory, TensorBoard."""

import json
import mmap
import time
import tracemalloc
from dataclasses import replace

import pytest
import torch
from harness.tiny_run import tiny_config, write_data

from sfd_fast.config import GuidanceConfig
from sfd_fast.planning.description import show
from sfd_fast.training.diffusion import diffusion_job, run_train
from sfd_fast.training.engines.interface import OVERFLOW
from sfd_fast.training.loop import TrainResult, build_engine
from sfd_fast.training.run import log as log_module
from sfd_fast.training.run.log import RunLog, StepLog, memory_gib, read_rows, rows_backwards
from sfd_fast.training.run.progress import NonFiniteError, Run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("latents"))


def step_log(values, bins):
    log = StepLog(["loss"], 4, torch.device("cpu"), num_bins=2)
    log.add_bins(torch.tensor(bins), torch.tensor(values), torch.tensor(0.0))
    return log


def test_losses_by_clock_of_all_ranks_survive_a_resume():
    """Two ranks: rank 0 writes the sums of both, and after a resume nothing is counted twice or lost."""
    ranks = [step_log([1.0, 2.0], [0, 1]), step_log([3.0, 7.0], [0, 0])]

    def over(ranks):
        return lambda mine: sum(log.bins for log in ranks)

    saved = ranks[0].state(over(ranks))
    assert saved["bins"] == [[11.0, 2.0], [3.0, 1.0]]
    resumed = [StepLog(["loss"], 4, torch.device("cpu"), num_bins=2) for _ in ranks]
    for number, log in enumerate(resumed):
        log.restore(saved, leader=number == 0)
    resumed[1].add_bins(torch.tensor([1]), torch.tensor([4.0]), torch.tensor(0.0))
    assert resumed[0].bin_means(over(resumed)) == pytest.approx([11 / 3, 6 / 2])


def test_overflows_of_the_loss_scale_are_skipped_steps_but_not_bad_ones(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", log_every=10, max_bad_steps=3)
    job = diffusion_job(config)
    run = Run(job, build_engine(job, "cpu"))
    settings = {"start_step": 0, "max_steps": 100, "progress": False, "tensorboard": False, "unit": "step"}
    log = RunLog(tmp_path, write=True, **settings)

    def steps(number, value, bad):
        for _ in range(number):
            run.step += 1
            values = [torch.tensor(value)] * len(run.steps.names)
            run.steps.add(values, torch.tensor(bad))
            if run.steps.full:
                run.read(log)

    steps(2, float("nan"), 1.0)
    steps(7, float("inf"), OVERFLOW)
    assert run.skipped == 9 and run.bad_in_row == 2
    assert "gradients overflow fp16 at this loss scale" in read_rows(log.path)[-1]["message"]
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        steps(3, float("nan"), 1.0)
    log.close()


def test_memory_on_a_cpu_is_what_resides(tmp_path, data):
    before = memory_gib(torch.device("cpu"))
    with mmap.mmap(-1, 2**29) as block:  # from the system: an allocator might hand out what resides already
        for _ in range(2**9):
            block.write(bytes(2**20))
        assert memory_gib(torch.device("cpu")) - before == pytest.approx(0.5, rel=0.1)
        rows = run_train(tiny_config(data, tmp_path / "run"), device="cpu", progress=False).metrics
    assert all(0.5 < row["memory_gib"] < 16 for row in rows)


@pytest.mark.gpu
def test_memory_on_a_gpu_is_the_peak_since_the_last_row():
    device = torch.device("cuda")
    block = torch.ones(2**27, device=device)
    del block
    assert memory_gib(device) >= 0.5
    assert memory_gib(device) < 0.5


def test_losses_by_clock_go_to_tensorboard(tmp_path, data):
    run_train(tiny_config(data, tmp_path / "run", tensorboard=True), device="cpu", progress=False)
    (events,) = (tmp_path / "run" / "tensorboard").glob("events*")
    written = events.read_bytes()
    assert b"train/loss_by_clock/5" in written and b"train/memory_gib" in written


def test_notes_are_said_at_the_start(tmp_path, data, capsys):
    config = tiny_config(data, tmp_path / "run", sample_every=8)
    config = replace(config, guidance=GuidanceConfig(mode="autoguidance", scale=2.0))
    events = [r for r in run_train(config, device="cpu", progress=False).metrics if r["kind"] == "event"]
    assert [e["step"] for e in events] == [0] and "unguided" in events[0]["message"]
    show(diffusion_job(config))
    assert "note: " in capsys.readouterr().out
    plain = run_train(tiny_config(data, tmp_path / "plain", sample_every=8), device="cpu", progress=False)
    assert not [r for r in plain.metrics if r["kind"] == "event"]


def test_a_million_rows_are_read_from_their_end(tmp_path):
    """Resuming at the last checkpoint takes no time and no memory for the rows before it."""
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        for start in range(0, 1_000_000, 10_000):
            steps = range(start, start + 10_000)
            file.writelines(f'{{"kind": "train", "step": {step}, "loss": 0.5}}\n' for step in steps)
        file.write('{"kind": "tr')
    size = path.stat().st_size
    tracemalloc.start()
    begin = time.process_time()
    log = RunLog(
        tmp_path, start_step=999_000, max_steps=2_000_000, write=True, progress=False, tensorboard=False, unit="step"
    )
    assert log.has("train", 999_000) and not log.has("evaluation", 999_000)
    log.row("train", 999_001, {"loss": 0.25})
    log.close()
    result = TrainResult(tmp_path, 999_001, None)
    assert result.loss == 0.25
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2 and peak < 2**21
    last = [json.loads(line) for line in path.read_bytes()[-200:].splitlines()[1:]]
    assert [row["step"] for row in last[-2:]] == [999_000, 999_001] and path.stat().st_size < size


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_rows_cross_the_blocks_in_which_they_are_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(log_module, "BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "event", "step": step, "message": "x" * (step % 5)} for step in range(20)]
    lines = [json.dumps(row) + "\n" for row in rows]
    for tail in ("", "{", '{"kind": "event", "step": 20}'):
        path.write_text("".join(lines) + tail)
        found = list(rows_backwards(path))
        assert [row for row, _ in found] == rows[::-1]
        ends = [sum(map(len, lines[: i + 1])) for i in range(20)]
        assert [end for _, end in found] == ends[::-1]
