"""train.deterministic: torch is asked for fixed orders of summation while a run trains, and only then."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness.tiny_run import tiny_config, write_data

from sfd_fast.training import loop
from sfd_fast.training.deterministic import deterministic_algorithms
from sfd_fast.training.diffusion import run_train
from sfd_fast.training.run.directory import num_threads, resume_notes


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_inside_algorithms_are_deterministic_and_fresh_memory_is_not_filled():
    with deterministic_algorithms():
        assert settings() == (True, False, False)  # warn_only would leave flash-attention's backward unordered
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # what torch's own message asks for


def test_the_settings_before_come_back_even_after_an_error():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(KeyError), deterministic_algorithms():
            raise KeyError
        assert settings() == (True, True, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_workspace_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic_algorithms():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_run_asks_for_it_where_its_settings_do(tmp_path, monkeypatch):
    seen = []

    def look(self):
        seen.append(settings()[0])
        return True  # as if it had been stopped before its first step

    monkeypatch.setattr(loop.Loop, "steps", look)
    data = write_data(tmp_path / "data")
    for number, wanted in enumerate((False, True)):
        config = tiny_config(data, tmp_path / str(number), deterministic=wanted)
        assert run_train(config, device="cpu", progress=False).preempted
    assert seen == [False, True] and settings()[0] is False


def test_every_operation_of_a_step_has_a_deterministic_algorithm_on_a_cpu(tmp_path):
    config = tiny_config(write_data(tmp_path / "data"), tmp_path / "run", deterministic=True, max_steps=2)
    assert run_train(config, device="cpu", progress=False).step == 2


@pytest.mark.parametrize(("device", "wanted", "said"), [("cuda", False, 1), ("cuda", True, 0), ("cpu", False, 0)])
def test_a_resume_on_cuda_says_that_the_bits_may_differ(device, wanted, said):
    engine = SimpleNamespace(device=torch.device(device), world_size=1)
    state = {"world_size": 1, "threads": num_threads(), "changes": [], "step": 4}
    with deterministic_algorithms() if wanted else contextlib.nullcontext():
        notes = resume_notes(engine, Path("run/checkpoints/4"), state)
    assert sum("train.deterministic gives the same bits" in note for note in notes) == said
