"""What the sampler's "auto" settings mean on a device."""

import logging

import pytest
import torch
from harness.tiny_pipelines import build

from sfd_fast.sampling.latents import chosen_for, say_once


def on_cuda(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    say_once.cache_clear()
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "given", "expected"),
    [
        ((9, 0), (None, "auto"), (torch.bfloat16, "cuda_graph")),
        ((8, 0), (None, "auto"), (torch.bfloat16, "cuda_graph")),
        ((7, 5), (None, "auto"), (torch.float32, "cuda_graph")),  # bf16 is software there
        ((9, 0), (torch.float32, "auto"), (torch.float32, "cuda_graph")),
        ((9, 0), (None, "compile"), (torch.bfloat16, "compile")),
        ((9, 0), (torch.float32, "eager"), (torch.float32, "eager")),
    ],
)
def test_a_gpu_samples_in_bf16_with_graphs_unless_told_otherwise(monkeypatch, caplog, capability, given, expected):
    with caplog.at_level(logging.INFO, "sfd_fast.sampling.latents"):
        assert chosen_for(on_cuda(monkeypatch, capability), *given) == expected
    said = [record.message for record in caplog.records]
    wanted = f"sampling in {expected[0]} with backend {expected[1]}; torch_dtype (--precision) and backend name others"
    assert said == ([] if given == expected else [wanted])


@pytest.mark.parametrize(("units", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_samples_eagerly_and_in_bf16_where_it_has_units_for_it(units, precision, monkeypatch, caplog):
    monkeypatch.setattr("sfd_fast.sampling.latents.has_bf16_units", lambda: units)
    say_once.cache_clear()
    with caplog.at_level("INFO"):
        pipelines = [build(device="cpu") for _ in range(2)]
    assert all((made.precision, made.backend) == (precision, "eager") for made in pipelines)
    assert caplog.text.count("--precision") == units  # said once, and only where it is not fp32
    assert build(device="cpu", torch_dtype=torch.float32).precision == "fp32"
    assert chosen_for(torch.device("cpu"), torch.bfloat16, "compile") == (torch.bfloat16, "compile")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("torch_dtype", torch.float16, "torch_dtype torch.float16 is unknown; choose torch.float32 or torch.bfloat16"),
        ("torch_dtype", "bf16", "torch_dtype bf16 is unknown"),
        ("backend", "graph", "backend 'graph' is unknown; choose auto, "),
    ],
)
def test_a_setting_that_does_not_exist_is_refused_with_the_list(name, value, message):
    with pytest.raises(ValueError, match=message):
        build(device="cpu", **{name: value})
