"""Which rank a process is, from the environments that torchrun, srun and sbatch make."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from sfd_fast.config import TrainConfig
from sfd_fast.ranks import Ranks, first_host, free_port, launch_name, slurm_meeting_point
from sfd_fast.training.loop import check_ranks

STEP = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}  # fmt: skip
"""what srun gives one of eight tasks on two nodes"""
MEETING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """The process's own environment without a trace of launchers; restored afterwards."""
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith("SLURM_") or n in MEETING]:
        del os.environ[name]
    yield os.environ
    os.environ.clear()
    os.environ.update(before)


def test_torchrun_and_deepspeed_name_the_rank():
    assert Ranks.read({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == Ranks(3, 4, 1)


def test_a_task_of_a_slurm_step_is_a_rank(environment):
    environment.update(STEP)
    assert Ranks.announce() == Ranks(5, 8, 1)
    assert {name: environment[name] for name in MEETING} == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu07", "MASTER_PORT": "15043",
    }  # fmt: skip
    assert Ranks.announce() == Ranks(5, 8, 1)  # now by the variables that it set


def test_a_meeting_point_that_the_user_chose_stays(environment):
    environment.update(STEP, MASTER_ADDR="ib7")
    Ranks.announce()
    assert environment["MASTER_ADDR"] == "ib7" and environment["MASTER_PORT"] == "15043"


def test_tasks_of_srun_do_not_train_one_by_one_into_one_folder():
    check_ranks(TrainConfig(engine="deepspeed"), Ranks.read(STEP).world_size)
    with pytest.raises(ValueError, match="one process, but 8 ranks were launched; set train.engine to 'deepspeed'"):
        check_ranks(TrainConfig(engine="torch"), Ranks.read(STEP).world_size)


def test_the_body_of_a_batch_script_is_alone(environment):
    """sbatch --ntasks=8 sets these in the script itself, which runs once."""
    environment.update({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "41"})
    assert Ranks.announce() == Ranks(0, 1, 0)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and environment["WORLD_SIZE"] == "1"


def test_torchrun_inside_a_slurm_step_counts_as_torchrun():
    assert Ranks.read(STEP | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}) == Ranks(1, 2, 1)


def test_half_a_launcher_is_an_error():
    with pytest.raises(ValueError, match="WORLD_SIZE is 4, but RANK is not set"):
        Ranks.read({"WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node", "node"),
        ("node7,node8", "node7"),
        ("host[01-03,7]", "host01"),
        ("host[7,01-03],other", "host7"),
        ("rack[2-3]-node[05,9]", "rack2-node05"),
        ("a-b.example.org,c[1-2]", "a-b.example.org"),
    ],
)
def test_the_first_host_of_a_slurm_list(hosts, first):
    assert first_host(hosts) == first


def test_steps_of_one_job_get_ports_of_their_own():
    ports = {slurm_meeting_point(STEP | {"SLURM_STEP_ID": str(step)})["MASTER_PORT"] for step in range(5)}
    assert len(ports) == 5 and all(15_000 <= int(port) < 30_000 for port in ports)
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST is not set"):
        slurm_meeting_point({})


def test_ranks_of_one_launch_have_a_name_in_common_and_those_of_another_have_not():
    ranks = [{"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "gpu07", "MASTER_PORT": "29500"} for r in range(2)]
    assert launch_name(ranks[0]) == launch_name(ranks[1])
    assert launch_name(ranks[0] | {"MASTER_PORT": "29501"}) != launch_name(ranks[0])
    steps = [STEP, STEP | {"SLURM_PROCID": "6"}, STEP | {"SLURM_STEP_ID": "3"}]
    assert launch_name(steps[0]) == launch_name(steps[1]) != launch_name(steps[2])
    assert launch_name({}) is None and launch_name({"RANK": "0", "WORLD_SIZE": "1"}) is None


def test_launches_that_meet_on_localhost_are_told_apart_by_their_machine(monkeypatch):
    rank = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    here = launch_name(rank)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert launch_name(rank) != here


@pytest.mark.parametrize(
    ("given", "num_devices", "expected_or_message"),
    [
        ("cuda", 4, "cuda:3"), ("cuda:1", 4, "cuda:1"), ("", 4, "cuda:3"), ("auto", 8, "cuda:3"), ("cpu", 4, "cpu"),
        ("auto", 0, "cpu"),
        ("cuda", 1, "cuda:0"),  # srun --gpus-per-task=1 shows each rank one device, whatever its place on the node
        ("cuda", 2, "CUDA device 3 is not there: this process sees 2"),
        ("cuda:1", 1, "CUDA device 1 is not there: this process sees 1"),
        ("cuda:x", 1, "device 'cuda:x' is unknown; choose"),
        ("cuda", 0, "torch sees none: choose cpu"),
    ],
)  # fmt: skip
def test_the_device_of_a_rank_is_current_and_has_a_number(given, num_devices, expected_or_message, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    if " " in expected_or_message:
        with pytest.raises(ValueError, match=expected_or_message):
            Ranks(7, 8, 3).device(given)
    else:
        chosen = Ranks(7, 8, 3).device(given)
        assert str(chosen) == expected_or_message
        assert current == ([chosen.index] if chosen.type == "cuda" else [])


def in_rank(rank, port, results, work):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = Ranks.join()
    try:
        with ranks.together():
            results.put((rank, work(ranks)))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))


def two_ranks(work, meanwhile=lambda processes: None):
    """What two processes put out."""
    context = multiprocessing.get_context("fork")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=in_rank, args=(rank, port, results, work), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    meanwhile(processes)
    return results, processes


def fails_on_the_second(ranks):
    if ranks.rank == 1:
        raise ValueError("the disk of rank 1 is full")
    return ranks.gather(1)


def test_a_rank_that_fails_stops_the_others_in_one_line():
    results, processes = two_ranks(fails_on_the_second)
    found = dict(results.get(timeout=120) for _ in range(2))
    assert found[1] == "ValueError: the disk of rank 1 is full"
    assert found[0] == "OSError: rank 1 failed: ValueError: the disk of rank 1 is full; this rank (0) stops too"
    for process in processes:
        process.join(timeout=60)


def stops_on_the_second(ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return ranks.gather(1)


def test_a_rank_that_is_stopped_is_named_and_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr("sfd_fast.ranks.STALL_S", 2.0)
    monkeypatch.setattr("sfd_fast.ranks.BEAT_S", 0.1)
    results, processes = two_ranks(stops_on_the_second)
    try:
        rank, text = results.get(timeout=120)
        assert rank == 0 and text.startswith("OSError: rank 1 of 2 has been silent for 2 s: it has stopped")
    finally:
        processes[1].kill()
        for process in processes:
            process.join(timeout=60)


def test_ranks_that_live_are_waited_for(monkeypatch):
    """Longer than a silent one would be."""
    monkeypatch.setattr("sfd_fast.ranks.STALL_S", 0.5)
    monkeypatch.setattr("sfd_fast.ranks.BEAT_S", 0.05)
    results, processes = two_ranks(lambda ranks: (time.sleep(2 * ranks.rank), ranks.gather(ranks.rank))[1])
    assert dict(results.get(timeout=120) for _ in range(2)) == {0: [0, 1], 1: [0, 1]}
    for process in processes:
        process.join(timeout=60)
