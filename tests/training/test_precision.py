"""train.precision 'auto' is settled by the device, before anything is computed or stored, and said once."""

import json
import logging

import pytest
import torch
from harness.tiny_run import tiny_config, write_data

from sfd_fast.config import SemVAETrainingConfig, SFDConfig, overlaid
from sfd_fast.training.diffusion import run_train
from sfd_fast.training.precision import settled


@pytest.mark.parametrize(
    ("units", "device", "precision"),
    [({"avx512_bf16": True}, "cpu", "parity"), ({"amx_bf16": True}, None, "parity"), ({}, "cpu", "fp32"),
     ({"avx512_f": True, "avx512_bf16": False}, "cpu", "fp32"), ({}, "cuda", "parity")],
)  # fmt: skip
def test_auto_is_fp32_on_a_cpu_without_bf16_units_only(monkeypatch, caplog, units, device, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, "sfd_fast"):
        for config in (SFDConfig(), SemVAETrainingConfig()):
            assert settled(config, device).train.precision == precision
    assert len([r for r in caplog.records if "has no bf16 units" in r.message]) == 2 * (precision == "fp32")


@pytest.mark.parametrize("given", ["parity", "bf16", "fp32"])
def test_a_precision_that_is_asked_for_stays(monkeypatch, given):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    config = overlaid(SFDConfig(), {"train.precision": given})
    assert settled(config, "cpu") == config


def test_a_run_stores_what_it_computed_with(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    config = tiny_config(write_data(tmp_path / "data"), tmp_path / "run", max_steps=1, precision="auto")
    run_train(config, device="cpu", progress=False)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["precision"] == "fp32"
