"""What only a GPU shows of the Triton kernels at real sizes: no waiting, no races, graphs, other devices."""

import pytest
import torch
from harness.kernel_cases import clone, flatten, map_tensors, run
from sfd_kernels.registry import INTERPRET, OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET, reason="needs compiled kernels"),
]
ALL = [op for op in OPS.values() if not op.on_cuda]
each_op = pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)


def at_xl(op, device="cuda"):
    """8192 tokens of XL in the autocast mix; the optimizer at the size of B, a quarter of a gigabyte."""
    size = "B" if op.name == "adamw_ema_step" else "XL"
    return next(op.examples("mix", size, batch=32, device=device))[1]


@each_op
def test_two_runs_at_full_size_are_bit_equal(op):
    args = at_xl(op)
    for a, b in zip(run(op, op, args), run(op, op, args)):
        assert torch.equal(a, b)


@each_op
def test_call_does_not_wait_for_the_device(op):
    args = at_xl(op)
    op(*args)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_op
def test_replayed_graph_follows_its_inputs(op):
    static, other = at_xl(op), map_tensors(lambda t: t.flip(0).contiguous() if t.dim() else clone(t), at_xl(op))
    expected = run(op, op, other)
    work = map_tensors(clone, static)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        op(*work)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = op(*work)
    for held, new in zip(flatten(work), flatten(other)):
        held.copy_(new)
    graph.replay()
    if op.mutates:
        outputs = [arg for name, arg in zip(op.__signature__.parameters, work) if name in op.mutates]
    for a, b in zip(flatten(outputs), expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["masked_velocity_update", "adamw_ema_step"])
def test_mutating_operator_allocates_nothing(name):
    op = OPS[name]
    args = at_xl(op)
    kernel = op.load_triton()
    kernel(*args)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kernel(*args)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@each_op
def test_tensors_of_another_device_are_served_there(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    args = next(op.examples("mix", "tiny", device="cuda:0"))[1]
    moved = map_tensors(lambda t: t.to("cuda:1"), args)
    for a, b in zip(run(op, op, args), run(op, op, moved)):
        assert b.device.index == 1 and torch.equal(a, b.to("cuda:0"))
