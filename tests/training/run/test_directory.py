"""The directory of a run: one launch at a time, what a continuation may change, ranks that differ, what is not ours."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness.tiny_run import MODEL, tiny_config, with_data, write_data

from sfd_fast.config import SFDConfig, overlaid
from sfd_fast.files.digest import settings_digest
from sfd_fast.training.checkpoints import read_state, write_state
from sfd_fast.training.diffusion import diffusion_job, run_train
from sfd_fast.training.loop import build_engine
from sfd_fast.training.run.directory import check_alike, launch_settings, lock

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("latents"))


def train(config, **options):
    return run_train(config, device="cpu", progress=False, **options)


def events(result):
    return [row["message"] for row in result.metrics if row["kind"] == "event"]


def test_a_second_launch_in_the_same_directory_is_told_who_is_there(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    with lock(tmp_path / "run"), pytest.raises(OSError, match=rf"in use by .*process {os.getpid()} on .*run.out"):
        train(config)
    assert train(config).step == 4


def test_the_optimizer_is_changed_where_that_is_asked_for_and_recorded(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4, log_every=1)
    train(config)
    slower = overlaid(config, {"optimizer.lr": 1e-5, "optimizer.schedule": "constant", "train.max_steps": 6})
    with pytest.raises(ValueError, match="optimizer.lr was 0.001 and is 1e-05, optimizer.schedule was .*train.change"):
        train(slower)
    with pytest.raises(ValueError, match="optimizer.schedule was 'cosine' and is 'constant'; set them back"):
        train(overlaid(slower, {"train.change": ["optimizer.lr"]}))
    asked = overlaid(slower, {"train.change": "optimizer.lr, optimizer.schedule"})
    result = train(asked)
    assert [row["lr"] for row in result.metrics if row["kind"] == "train"][4:] == [1e-5, 1e-5]
    assert "optimizer.lr was 0.001 and is 1e-05, as train.change allows" in events(result)
    changes = [{"step": 4, "key": "optimizer.lr", "was": 1e-3, "is": 1e-5},
               {"step": 4, "key": "optimizer.schedule", "was": "cosine", "is": "constant"}]  # fmt: skip
    assert read_state(tmp_path / "run" / "checkpoints" / "00000006")["changes"] == changes
    later = train(overlaid(slower, {"train.max_steps": 7}))  # from here on these are the run's own settings
    assert read_state(later.directory / "checkpoints" / "00000007")["changes"] == changes
    assert len([line for line in events(later) if "train.change" in line]) == 2


def test_only_settings_of_the_optimizer_can_be_named():
    with pytest.raises(ValueError, match="train.change 'model.depth' is unknown; choose optimizer.lr, "):
        overlaid(SFDConfig(), {"train.change": ["model.depth"]})


def test_a_folder_of_unknown_origin_in_the_place_of_the_model_is_left_alone(tmp_path, data):
    mine = tmp_path / "run" / "model"
    mine.mkdir(parents=True)
    (mine / "model.safetensors").write_text("my thesis")
    with pytest.raises(ValueError, match=r"run/model holds model.safetensors and was not written by this system"):
        train(tiny_config(data, tmp_path / "run", max_steps=4))
    assert (mine / "model.safetensors").read_text() == "my thesis" and not (tmp_path / "run/metrics.jsonl").exists()
    (mine / "model.safetensors").unlink()
    assert train(tiny_config(data, tmp_path / "run", max_steps=4)).model == mine  # an empty folder is nobody's
    assert train(tiny_config(data, tmp_path / "run", max_steps=5)).model == mine


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints/00000002/photo.jpg"])
def test_files_of_others_in_the_place_of_ours_end_a_run_before_it_writes(tmp_path, data, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match="is there already and (was not written by this command|is no checkpoint)"):
        train(tiny_config(data, tmp_path / "run", max_steps=4))
    assert mine.read_text() == "{}"
    assert [path for path in sorted((tmp_path / "run").rglob("*")) if path.name != ".lock"] == before


def test_a_log_without_checkpoints_is_not_emptied(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    train(config)
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="metrics.jsonl is the log of a run whose checkpoints are gone"):
        train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train(config)
    assert len((tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()) == len(rows.splitlines())


def test_a_missing_pointer_does_not_start_the_run_anew(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    train(config)
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    with pytest.raises(ValueError, match="latest is missing.* intact checkpoints are there: 00000004"):
        train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, resume=False)


def test_another_number_of_threads_is_said_on_resume(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    train(config)
    folder = tmp_path / "run" / "checkpoints" / "00000004"
    state = read_state(folder)
    assert state["threads"] == [torch.get_num_threads(), torch.get_num_interop_threads()]
    write_state(folder, state | {"threads": [7, 1]})
    result = train(overlaid(config, {"train.max_steps": 5}))
    said = f"saved with 7 threads, resumed with {torch.get_num_threads()}: equal to rounding"
    assert any(line.startswith(said) for line in events(result))


class SecondRank:
    """An engine as check_alike sees it on rank 1, where rank 0 was started with another job."""

    rank = 1

    def __init__(self, job):
        self.first = launch_settings(job, self)

    def files(self):
        return {}

    def gather(self, value):
        return [settings_digest(self.first) if isinstance(value, str) else self.first, value]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.lr": 1e-5}, "rank 1 was started otherwise than rank 0: optimizer.lr is 0.001 on rank 0 and 1e-05"),
        ({"train.seed": 7}, "rank 1 was .*: train.seed is 0 on rank 0 and 7 on rank 1; start all ranks"),
        ({"run.log_every": 9}, "run.log_every is 4 on rank 0 and 9 on rank 1"),
    ],
)
def test_ranks_with_other_settings_are_named(tmp_path, data, changes, message):
    config = tiny_config(data, tmp_path / "run")
    first, second = (diffusion_job(made) for made in (config, overlaid(config, changes)))
    with pytest.raises(ValueError, match=message):
        check_alike(second, SecondRank(first))


def test_ranks_on_other_data_are_named_and_copies_of_the_same_are_not(tmp_path, data):
    """The other set has as many samples and the same statistics, but other values."""
    first = diffusion_job(tiny_config(data, tmp_path / "run"))
    other = diffusion_job(tiny_config(write_data(tmp_path / "other", seed=1), tmp_path / "run"))
    with pytest.raises(ValueError, match="rank 1 was .*: data is {.*'samples': .*} on rank 0 and {"):
        check_alike(other, SecondRank(first))
    check_alike(diffusion_job(tiny_config(write_data(tmp_path / "copy"), tmp_path / "run")), SecondRank(first))


def test_classes_that_no_sample_has_are_said_with_their_number(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=1)
    more = replace(config, model=replace(MODEL, num_classes=12))
    said = f"model.num_classes is 12, but {data} has images of 5 classes: 7 are never trained"
    assert any(line.startswith(said) for line in events(train(more)))
    assert events(train(replace(config, run=replace(config.run, out=str(tmp_path / "exact"))))) == []


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_another_default_dtype_is_refused(tmp_path, data, kind):
    torch.set_default_dtype(kind)
    try:
        with pytest.raises(ValueError, match=f"default dtype is {kind}; training needs torch.float32"):
            train(tiny_config(data, tmp_path / "run"))
    finally:
        torch.set_default_dtype(torch.float32)


def damaged_states():
    """Changes of a state that keep its digest right: what remains is one line with the file's name."""
    keys = "config", "identity", "record", "world_size", "threads", "changes", "interval", "recent_norms", "wall_s"
    for key in keys:
        yield f"no {key}", lambda state, key=key: state.pop(key)
        yield f"{key} as text", lambda state, key=key: state.update({key: "x"})
    yield "sums of text", lambda state: state["interval"].update(sums=["x"] * 5)
    yield "no count", lambda state: state["interval"].pop("count")
    yield "ragged bins", lambda state: state["interval"].update(bins=[[1.0], [1.0, 2.0]])
    yield "norms of text", lambda state: state.update(recent_norms=["x"])


def test_a_malformed_state_is_one_line_with_its_name(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    train(config)
    folder = tmp_path / "run" / "checkpoints" / "00000004"
    whole = read_state(folder)
    for name, change in damaged_states():
        state = json.loads(json.dumps(whole))
        change(state)
        write_state(folder, state)
        with pytest.raises(ValueError, match=r"00000004/state.json") as error:
            train(overlaid(config, {"train.max_steps": 5}))
        assert "\n" not in str(error.value) and len(str(error.value)) < 600, name


def test_malformed_rows_are_one_line_with_the_files_name(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", max_steps=4)
    train(config)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    for line in (b"{}", b"[]", b"[" * 50_000, b'{"kind": "train", "step": "4"}', b"\x00\xff", b"", b"x" * 2**21):
        path.write_bytes(whole + line + b"\n")
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.* the line that ends at byte") as error:
            train(overlaid(config, {"train.max_steps": 5}))
        assert "\n" not in str(error.value)
    path.write_bytes(whole + b"\x00" * 100_000)  # what a power cut may leave of a line
    assert len(train(overlaid(config, {"train.max_steps": 5})).metrics) > len(whole.splitlines())


def test_an_empty_data_set_is_one_line(tmp_path):
    folder = write_data(tmp_path / "data", num_samples=0)
    for validation in (0, 8):
        with pytest.raises(ValueError, match="sample") as error:
            train(with_data(tiny_config(folder, tmp_path / "run"), validation_samples=validation))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_with_75(tmp_path, data, number):
    """Sent as soon as the process handles it, while libraries are imported and data opened."""
    code = (
        "import os, signal, sys\n"
        "from sfd_fast import cli\n"
        "load = cli.load\n"
        f"cli.load = lambda path: (os.kill(os.getpid(), {int(number)}), load(path))[1]\n"
        "cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "train", "--data.path", str(data), "--run.out", str(tmp_path / "run")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    start = time.monotonic()
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert not (tmp_path / "run").exists() and time.monotonic() - start < 60


def test_settings_of_one_process_are_alike(tmp_path, data):
    job = diffusion_job(tiny_config(data, tmp_path / "run"))
    check_alike(job, build_engine(job, "cpu"))
