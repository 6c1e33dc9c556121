"""The pipeline on CUDA in bf16 under each backend: images close to those of fp32 on the CPU, captured graphs exact."""

import pytest
import torch
from harness.tiny_pipelines import build, drawn

pytestmark = pytest.mark.gpu
LABELS = list(range(7))  # one micro-batch of four and a part of the next
BACKENDS = ("eager", "compile", "cuda_graph")


def images(pipeline, seed=0):
    return torch.from_numpy(drawn(pipeline, LABELS, seed=seed))


@pytest.fixture(scope="module")
def exact():
    return images(build(device="cpu", torch_dtype=torch.float32, backend="eager"))


@pytest.fixture(scope="module")
def eager():
    return images(build(device="cuda", torch_dtype=torch.bfloat16, backend="eager"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_are_close_to_those_of_fp32_on_the_cpu(exact, backend):
    found = images(build(device="cuda", torch_dtype=torch.bfloat16, backend=backend))
    assert found.shape == exact.shape and found.dtype == torch.uint8
    difference = (found.float() - exact.float()).abs()
    assert difference.mean() < 2.0, f"{difference.mean():.2f} of 255"  # bf16 weights: 8 bits


def test_fp32_on_cuda_gives_the_cpus_images_to_a_level(exact):
    found = images(build(device="cuda", torch_dtype=torch.float32, backend="eager"))
    assert (found.int() - exact.int()).abs().max() <= 1


def test_captured_graphs_give_the_bits_of_eager_steps(eager):
    assert torch.equal(images(build(device="cuda", torch_dtype=torch.bfloat16, backend="cuda_graph")), eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_call_and_another_seed(backend, eager):
    pipeline = build(device="cuda", torch_dtype=torch.bfloat16, backend=backend)
    first, other, again = images(pipeline), images(pipeline, seed=1), images(pipeline)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_image_does_not_depend_on_its_company():
    pipeline = build(device="cuda", torch_dtype=torch.bfloat16, backend="cuda_graph")
    alone = drawn(pipeline, [3], sample_ids=[3])[0]
    assert torch.equal(torch.from_numpy(alone), images(pipeline)[3])
