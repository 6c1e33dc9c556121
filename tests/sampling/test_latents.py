"""What the sampler's "auto" settings mean on a device."""

import logging

import pytest
import torch
from harness.tiny_pipelines import build

from sfd_fast.sampling.latents import chosen_for


def on_cuda(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "given", "expected"),
    [
        ((9, 0), ("auto", "auto"), ("bf16", "cuda_graph")),
        ((8, 0), ("auto", "auto"), ("bf16", "cuda_graph")),
        ((7, 5), ("auto", "auto"), ("fp32", "cuda_graph")),  # bf16 is software there
        ((9, 0), ("fp32", "auto"), ("fp32", "cuda_graph")),
        ((9, 0), ("auto", "compile"), ("bf16", "compile")),
        ((9, 0), ("fp32", "eager"), ("fp32", "eager")),
    ],
)
def test_a_gpu_samples_in_bf16_with_graphs_unless_told_otherwise(monkeypatch, caplog, capability, given, expected):
    with caplog.at_level(logging.INFO, "sfd_fast.sampling.latents"):
        assert chosen_for(on_cuda(monkeypatch, capability), *given) == expected
    said = [record.message for record in caplog.records]
    assert said == ([] if given == expected else [f"sampling in {expected[0]} with backend {expected[1]}; precision "
                                                  "and backend name others"])  # fmt: skip


def test_a_cpu_samples_in_fp32_eagerly():
    pipeline = build(device="cpu")
    assert (pipeline.precision, pipeline.backend) == ("fp32", "eager")
    assert chosen_for(torch.device("cpu"), "bf16", "compile") == ("bf16", "compile")


@pytest.mark.parametrize(("name", "value"), [("precision", "fp16"), ("backend", "graph")])
def test_a_setting_that_does_not_exist_is_refused_with_the_list(name, value):
    with pytest.raises(ValueError, match=f"{name} '{value}' is unknown; choose auto, "):
        build(device="cpu", **{name: value})
