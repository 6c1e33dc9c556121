"""train.deterministic: torch is asked for fixed orders of summation while a run trains, and only then."""

import os

import pytest
import torch

from sfd_fast.training.deterministic import deterministic_algorithms


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
