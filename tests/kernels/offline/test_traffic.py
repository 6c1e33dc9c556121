"""Counted bytes: sampling, what is read once, what is not read. test_interpreter.py runs this file."""

import pytest
import torch
from sfd_kernels.offline.examples import MODES, Make
from sfd_kernels.offline.traffic import _record, execute, sampled_programs
from sfd_kernels.registry import INTERPRET, OPS

pytestmark = pytest.mark.skipif(not INTERPRET, reason="counts the accesses of Triton's interpreter: TRITON_INTERPRET=1")


def test_sampled_bytes_equal_those_of_all_programs():
    op = OPS["noise_latents"]
    args = next(op.examples(size="B", batch=6))[1]
    ((kernel, num_programs, launch_args, meta),) = _record(op, args)
    assert num_programs == 6 * 12
    counts = [
        execute(kernel, launch_args, meta, num_programs, programs)
        for programs in (range(num_programs), sampled_programs(num_programs))
    ]
    for kind in ("loaded", "stored"):
        full, sampled = (counter[kind] for counter in counts)
        scale = num_programs / len(sampled_programs(num_programs))
        assert full == {name: round(number * scale) for name, number in sampled.items()}


def test_every_large_tensor_is_read_once_and_written_once():
    op = OPS["gated_residual_norm_modulate_backward"]
    make = Make(MODES["mix"], "cpu")
    x, narrow, gate, scale = make.wide(2, 37, 1100), make.narrow(2, 37, 1100), *make.packed(2, 2, 1100)
    args = make.wide(2, 37, 1100), narrow, x, narrow.clone(), gate, make.weight(1100), scale, 1e-6
    kernel, num_programs, launch_args, meta = _record(op, args)[0]
    counts = execute(kernel, launch_args, meta, num_programs, range(num_programs))
    elements = 2 * 37 * 1100
    inputs = {"dx_new": 4, "dy": 2, "x": 4, "branch": 2}
    assert {name: counts["loaded"][name] for name in inputs} == {name: elements * size for name, size in inputs.items()}
    assert {name: counts["stored"][name] for name in ("dx", "dbranch")} == {"dx": elements * 4, "dbranch": elements * 2}


@pytest.mark.parametrize("coefficient,slots", [(0.5, 1), (0.0, 0)])
def test_history_that_no_stream_uses_is_not_read(coefficient, slots):
    make = Make(MODES["fp32"], "cpu")
    x, v, history = make.state(2, 5, 4, 4), make.state(2, 5, 4, 4), make.state(1, 2, 5, 4, 4)
    coefficients = torch.tensor([[0.1, coefficient], [0.2, 0.0]])
    args = x, None, history, v, None, None, coefficients, make.integers(-1), None, 3
    ((kernel, num_programs, launch_args, meta),) = _record(OPS["masked_velocity_update"], args)
    counts = execute(kernel, launch_args, meta, num_programs, range(num_programs))
    assert counts["loaded"]["history"] == slots * history.numel() * 4
    assert counts["stored"]["history"] == 0
