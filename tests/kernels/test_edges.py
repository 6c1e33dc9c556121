"""Triton kernels just past the edges of their tiles: several programs, splits, groups and masked remainders.

The registry's tiny examples fit one tile. These tests run on a GPU as they are; elsewhere test_interpreter.py runs them
in Triton's interpreter on CPU tensors.
"""

import pytest
import torch
from harness.kernel_cases import assert_accurate, run, to_double
from sfd_kernels.offline.examples import MODES, Make
from sfd_kernels.registry import INTERPRET, OPS

DEVICE = "cpu" if INTERPRET else "cuda"
on_kernels = [] if INTERPRET else [pytest.mark.gpu]


def norm(make, b, n, d):
    scale, shift, gate = make.packed(3, b, d)
    return {
        "rms_norm_modulate": (make.wide(b, n, d), make.weight(d), shift, scale, 1e-6),
        "rms_norm_modulate_backward": (make.narrow(b, n, d), make.wide(b, n, d), make.weight(d), scale, 1e-6),
        "gated_residual_norm_modulate": (
            make.wide(b, n, d), make.narrow(b, n, d), gate, make.weight(d), shift, scale, 1e-6
        ),
        "gated_residual_norm_modulate_backward": (
            make.wide(b, n, d), make.narrow(b, n, d), make.wide(b, n, d), make.narrow(b, n, d), gate, make.weight(d),
            scale, 1e-6,
        ),
    }  # fmt: skip


def qk(make, b, n, h, d):
    qkv = make.narrow(b, n, 3, h, d)
    tables = make.weight(d), make.weight(d), make.state(n, d), make.state(n, d), 1e-6
    # Gradients as attention returns them: heads before tokens in memory.
    dq, dk = (make.narrow(b, h, n, d).transpose(1, 2) for _ in range(2))
    return {
        "qk_norm_rope": (qkv, *tables),
        "qk_norm_rope_backward": (dq, dk, make.narrow(b, n, h, d), qkv, *tables),
    }


def losses(make, b, latent, tokens, features):
    pred, x0, x1 = make.narrow(b, *latent), make.wide(b, *latent), make.wide(b, *latent)
    p, t, d1, d2 = make.narrow(b, tokens, features), make.wide(b, tokens, features), make.state(b), make.state(b)
    return {
        "flow_matching_loss": (pred, x0, x1, 5, 2.0),
        "flow_matching_loss_backward": (d1, d2, pred, x0, x1, 5, 2.0),
        "feature_alignment_loss": (p, t),
        "feature_alignment_loss_backward": (d1, d2, p, t),
        "noise_latents": (x1, x0, make.uniform(b), make.uniform(b), 5),
    }


def optimizer(make):
    # More tensors than a launch takes (64), one empty, some of several blocks, two kinds of copies; sizes that 8
    # divides and that it does not, in launches of their own.
    shapes = [(3,)] * 130 + [(0,), (2049,), (5, 7), (1024,), (1,), (2056,), (8,), (40, 32)]
    params, firsts, emas = ([make.state(*shape) for shape in shapes] for _ in range(3))
    seconds = [make.state(*shape).square() for shape in shapes]
    copies = [p.to(torch.float16 if index % 2 else torch.bfloat16) for index, p in enumerate(params)]
    scalars = [make.scalar(value) for value in (1e-2, 0.9, 2, 0.5, 0)]
    grads = [make.narrow(*shape) for shape in shapes]
    return {"adamw_ema_step": (params, grads, firsts, seconds, emas, copies, *scalars, 0.9, 0.999, 1e-8, 0.1)}


EDGES = {
    # 37 tokens: several programs a sample, the last with a remainder; 1100 columns in a block of 2048.
    "norms past a split": lambda make: norm(make, 2, 37, 1100),
    # 33 samples: the second stage takes 32 at a time; 40 columns: two programs.
    "norms past the second stage's tile": lambda make: norm(make, 33, 2, 40),
    # 5 samples in groups of 4, 12 heads in groups of 4, d = 24 in a block of 32.
    "heads and samples past a group": lambda make: qk(make, 5, 2, 12, 24),
    # 3 heads where tiles have 4, strides that no vector divides
    "heads below a group": lambda make: qk(make, 2, 3, 3, 6),
    # 18 channels past 16, 272 positions past 256, 4896 elements past 1024; 19 tokens past two splits of 8
    "losses past a block": lambda make: losses(make, 2, (18, 17, 16), 19, 70),
    "columns past a block": lambda make: {
        "swiglu": (make.narrow(3, 2 * 1030),),
        "swiglu_backward": (make.narrow(3, 1030), make.narrow(3, 2 * 1030)),
    },
    "words past a block": lambda make: {
        name: (make.integers(7, 2**40 + 1), -5, 3, 1030) for name in ("philox_bits", "philox_normal")
    },
    "tensors past a launch": optimizer,
}


def edges():
    for name, build in EDGES.items():
        for operator in build(Make(MODES["fp32"], "cpu")):
            yield pytest.param(operator, name, marks=on_kernels, id=f"{operator}-{name}".replace(" ", "_"))


@pytest.mark.parametrize("operator,edge", edges())
def test_edge_of_a_tile(operator, edge):
    op = OPS[operator]
    mode = "fp32" if INTERPRET else "mix"
    args = EDGES[edge](Make(MODES[mode], DEVICE))[operator]
    assert_accurate(run(op, op, args), run(op.reference, op, args), run(op.reference, op, to_double(args)), operator)


@pytest.mark.parametrize("operator", ["rms_norm_modulate_backward", "gated_residual_norm_modulate_backward"])
@pytest.mark.parametrize("edge", [pytest.param("norms past a split", marks=on_kernels)])
def test_reductions_over_several_programs_are_bit_equal_between_runs(operator, edge):
    op = OPS[operator]
    args = EDGES[edge](Make(MODES["fp32"], DEVICE))[operator]
    for a, b in zip(run(op, op, args), run(op, op, args)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_rows", [pytest.param(1025, marks=on_kernels)])
def test_second_stage_sums_more_rows_than_its_tile(num_rows):
    from sfd_kernels.triton.column_sums import column_sums

    partials = torch.arange(num_rows * 2 * 9, device=DEVICE).reshape(num_rows, 18).remainder(7).float()
    first, second = torch.empty(9, device=DEVICE), torch.empty(9, device=DEVICE)
    column_sums(partials, [first, second])
    assert torch.equal(torch.cat([first, second]), partials.sum(0))
