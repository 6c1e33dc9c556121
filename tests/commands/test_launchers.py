"""The real commands: one run of `sfd train` that goes from launcher to launcher, stopped by the file STOP each time."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from harness.tiny_run import tiny_config, write_data

from sfd_fast.config import to_dict

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: DS_BUILD_OPS=0 pip install deepspeed==0.19.8",
)
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(folder, *commands, stop=False, **variables):
    """(exit codes, output) of processes started together; with `stop`, STOP is touched once the run has validated."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in ("RANK", "WORLD_SIZE")}
    environment = kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    rows = folder / "run" / "metrics.jsonl"
    before = rows.read_text().count("validation") if rows.exists() else 0
    output = folder / "output"
    with open(output, "w") as file:
        processes = [
            subprocess.Popen(
                list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=environment | {name: value.format(rank=rank) for name, value in variables.items()},
            )
            for rank, command in enumerate(commands)
        ]  # fmt: skip
        deadline = time.monotonic() + 150
        try:
            while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
                if stop and rows.exists() and rows.read_text().count("validation") > before:
                    (folder / "run" / "STOP").touch()
                    stop = False
                time.sleep(0.1)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    return [p.returncode for p in processes], output.read_text()


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """{launcher: (exit codes, output, step of the last checkpoint)}, in the order of the launches."""
    folder = tmp_path_factory.mktemp("launchers")
    settings = {"engine": "deepspeed", "max_steps": 100_000, "log_every": 1, "validate_every": 5, "sample_every": 5}
    config = tiny_config(write_data(folder / "data"), folder / "run", num_sample_images=2, **settings)
    (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    train = ["train", "--config", folder / "run.yaml"]
    deepspeed = [BIN / "deepspeed", "--num_accelerators", 2, "--master_port", free_port()]
    torchrun = [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port()]
    srun = [BIN / "sfd", *train, "--deepspeed.zero_stage", 3]
    task = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "1", "MASTER_PORT": free_port(),
    }  # fmt: skip
    found = {}

    def visit(name, *commands, **options):
        codes, output = launch(folder, *commands, **options)
        found[name] = codes, output, int((folder / "run" / "checkpoints" / "latest").read_text())

    visit("deepspeed", [*deepspeed, "--module", "sfd_fast", *train, "--deepspeed.zero_stage", 2], stop=True)
    visit("torchrun", [*torchrun, "-m", "sfd_fast", *train], stop=True)
    visit("srun", srun, srun, stop=True, **task)
    last = found["srun"][2] + 3
    visit("alone", [BIN / "sfd", *train, "--train.max_steps", last], SLURM_NTASKS="2", SLURM_PROCID="0")
    found["folder"] = folder / "run"
    return found


def test_the_deepspeed_launcher_passes_75_on(journey):
    codes, output, step = journey["deepspeed"]
    assert codes == [75], output[-4000:]
    assert step >= 5 and "stopped by the file STOP; saved, start again to go on" in output


def test_torchrun_resumes_and_turns_75_into_its_own_code(journey):
    codes, output, step = journey["torchrun"]
    assert codes == [1], output[-4000:]
    assert "exitcode" in output and ": 75" in output
    assert f"resumed from {journey['folder']}/checkpoints/{journey['deepspeed'][2]:08d}" in output
    assert step > journey["deepspeed"][2]


def test_srun_tasks_are_ranks_that_resume_and_end_with_75(journey):
    codes, output, step = journey["srun"]
    assert codes == [75, 75], output[-4000:]
    assert f"resumed from {journey['folder']}/checkpoints/{journey['torchrun'][2]:08d}" in output
    assert step > journey["torchrun"][2]


def test_one_process_in_a_batch_script_finishes_what_two_ranks_began(journey):
    codes, output, step = journey["alone"]
    assert codes == [0], output[-4000:]
    assert "saved by 2 ranks, resumed by 1: equal to rounding" in output
    assert step == journey["srun"][2] + 3
    assert (journey["folder"] / "model" / "model.safetensors").is_file()


def test_every_step_of_the_journey_stands_once_in_the_log(journey):
    rows = [json.loads(line) for line in (journey["folder"] / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, journey["alone"][2] + 1))
    drawn = {int(path.stem) for path in (journey["folder"] / "samples").glob("*.png")}
    assert {row["step"] for row in rows if row["kind"] == "validation"} == drawn
