"""Every operator of the registry, on every device there is: accuracy, gradients, layouts, dispatch and compilation."""

import pytest
import torch
from harness.kernel_cases import (
    DEVICES,
    DIFFERENTIABLE,
    FORWARD,
    LOW_PRECISION_MODES,
    assert_accurate,
    cases,
    clone,
    example,
    flatten,
    map_tensors,
    require_kernel,
    run,
    to_double,
)
from sfd_kernels import reference_only
from sfd_kernels.registry import INTERPRET, OPS
from torch.autograd import forward_ad

ALL = list(OPS.values())
not_interpreted = pytest.mark.skipif(INTERPRET, reason="says nothing about a kernel that the interpreter runs")
each_device = pytest.mark.parametrize("device", DEVICES)
each_op = pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)


def gradients(op, args, seed=5):
    """Gradient of every differentiable argument for reproducible output gradients."""
    args = op.wanting_gradients(args)
    outputs = flatten(op(*args))
    generator = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(o) for o in outputs
    ]
    leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
    return list(torch.autograd.grad(outputs, leaves, grads))


@each_device
@pytest.mark.parametrize("op,mode,label", cases(ALL, LOW_PRECISION_MODES))
def test_error_is_at_most_twice_the_references(op, mode, label, device):
    require_kernel(op)
    args = example(op, mode, label, device)
    assert_accurate(run(op, op, args), run(op.reference, op, args), run(op.reference, op, to_double(args)), op.name)


@each_device
@pytest.mark.parametrize("op,mode,label", cases(FORWARD, LOW_PRECISION_MODES, without="zero prediction"))
def test_every_gradient_is_as_accurate_as_the_references(op, mode, label, device):
    require_kernel(op)
    args = example(op, mode, label, device)
    ours = gradients(op, args)
    with reference_only():
        assert_accurate(ours, gradients(op, args), gradients(op, to_double(args)), op.name)


@each_device
@pytest.mark.parametrize("name", ["flow_matching_loss", "feature_alignment_loss"])
def test_zero_prediction_has_cosine_zero_and_no_cosine_gradient(name, device):
    op = OPS[name]
    require_kernel(op)
    args = op.wanting_gradients(example(op, label="zero prediction", device=device))
    _, cosine = op(*args)
    assert torch.equal(cosine, torch.ones_like(cosine))
    (gradient,) = torch.autograd.grad(cosine.sum(), args[0])
    assert torch.equal(gradient, torch.zeros_like(gradient))


@each_device
@pytest.mark.parametrize("mode", LOW_PRECISION_MODES)
@pytest.mark.parametrize("name", ["swiglu", "condition_silu", "swiglu_backward", "condition_silu_backward"])
def test_infinities_in_a_silu_give_what_torch_gives(name, mode, device):
    """silu(-inf) is -inf * 0, not a number; finite neighbours keep their values."""
    op = OPS[name]
    require_kernel(op)
    args = list(example(op, mode, device=device))
    position = 1 if op.is_backward else 0
    flat = args[position].view(-1)
    flat[0], flat[3] = -torch.inf, torch.inf
    gate = flat[:5].double() if name.startswith("swiglu") else flat[:5].double() + args[-1].view(-1)[:5].double()
    got, expected = flatten(op(*args))[0].view(-1)[:5], torch.nn.functional.silu(gate)
    assert expected.isnan().tolist() == [True, False, False, False, False]
    assert got.isnan().tolist() == [True, False, False, op.is_backward, False]
    exact = flatten(op.reference(*to_double(tuple(args))))[0].view(-1)[:5]
    finite = exact.isfinite()
    assert torch.equal(got[~finite].nan_to_num(), exact[~finite].to(got.dtype).nan_to_num())
    assert_accurate([got[finite]], [flatten(op.reference(*args))[0].view(-1)[:5][finite]], [exact[finite]], name)


@each_device
def test_philox_normal_is_within_two_units_in_the_last_place(device):
    op = OPS["philox_normal"]
    require_kernel(op)
    args = torch.arange(5, device=device) + 2**33, 42, 1, 1000
    got, expected = op(*args), op.reference(*args)
    unit = torch.nextafter(expected.abs(), torch.full_like(expected, torch.inf)) - expected.abs()
    assert ((got - expected).abs() <= 2 * unit).all()


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unguided", ["texture", "semantic"])
def test_a_stream_of_guidance_weight_one_keeps_the_velocitys_bits_whatever_the_guide_holds(unguided, dtype, device):
    op = OPS["masked_velocity_update"]
    generator = torch.Generator().manual_seed(0)
    v, guide = torch.randn(2, 2, 5, 3, 7, generator=generator).to(dtype).to(device)
    x, history = torch.zeros(2, 5, 3, 7, device=device), torch.zeros(1, 2, 5, 3, 7, device=device)
    alone, other = (slice(0, 3), slice(3, 5)) if unguided == "texture" else (slice(3, 5), slice(0, 3))
    guide[:, alone] = float("nan")
    weights = torch.tensor([1.0, 1.8] if unguided == "texture" else [1.8, 1.0], device=device)
    coefficients = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device)
    op(x, None, history, v, guide, weights, coefficients, torch.tensor([0], device=device), None, 3)
    for written in (x, history[0]):
        assert torch.equal(written[:, alone], v[:, alone].float())
        mixed = guide[:, other].double() + 1.8 * (v[:, other].double() - guide[:, other].double())
        torch.testing.assert_close(written[:, other].double(), mixed, rtol=1e-5, atol=1e-6)


@each_device
@pytest.mark.parametrize("name,position", [("flow_matching_loss", 1), ("feature_alignment_loss", 1)])
def test_loss_refuses_to_differentiate_its_target(name, position, device):
    args = list(example(OPS[name], device=device))
    args[position].requires_grad_()
    with pytest.raises(ValueError, match="detach"):
        OPS[name](*args)


@not_interpreted
@each_device
@pytest.mark.parametrize("mode", ["fp32", "mix"])
@each_op
def test_real_width_is_as_accurate_as_the_reference(op, mode, device):
    size = "S" if op.name == "adamw_ema_step" else "XL"
    args = example(op, mode, device=device, size=size, batch=1)
    assert_accurate(run(op, op, args), run(op.reference, op, args), run(op.reference, op, to_double(args)), op.name)


@each_device
@each_op
def test_strided_inputs_give_the_same_result(op, device):
    require_kernel(op)
    args = example(op, device=device)

    def spread(tensor):
        gaps = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype, device=tensor.device)
        gaps[..., 0] = tensor
        return gaps[..., 0]

    def transposed(tensor):
        return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor

    expected = run(op, op, args)
    for layout in (spread, transposed):
        got = run(op, op, map_tensors(layout, args))
        exact = run(op.reference, op, to_double(args))
        assert_accurate(got, expected, exact, f"{op.name} {layout.__name__}")


@each_device
@pytest.mark.parametrize("op", FORWARD, ids=lambda op: op.name)
def test_expanded_gradient_is_taken(op, device):
    require_kernel(op)
    args = op.wanting_gradients(example(op, device=device))
    leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
    expanded = torch.autograd.grad(sum(o.sum() for o in flatten(op(*args))), leaves)
    outputs = flatten(op(*args))
    dense = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    for a, b in zip(expanded, dense):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_device
@each_op
def test_empty_batch_gives_empty_or_zero_results(op, device):
    require_kernel(op)
    args = example(op, device=device, batch=0)
    if op.name in ("adamw_ema_step", "total_norm"):
        args = tuple([] if isinstance(arg, list) else arg for arg in args)
    expected, got = run(op.reference, op, args), run(op, op, args)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@each_device
@pytest.mark.parametrize("op,mode,label", cases([op for op in ALL if not op.mutates], ["fp32", "mix"]))
def test_outputs_are_fresh_and_contiguous(op, mode, label, device):
    require_kernel(op)
    args = example(op, mode, label, device)
    outputs = flatten(op(*args))
    storages = [t.untyped_storage().data_ptr() for t in [*outputs, *flatten(args)] if t.numel()]
    own = [t.untyped_storage().data_ptr() for t in outputs if t.numel()]
    assert all(output.is_contiguous() for output in outputs)
    assert all(storages.count(pointer) == 1 for pointer in own)


@each_device
@each_op
def test_two_runs_are_bit_equal(op, device):
    require_kernel(op)
    args = example(op, "mix", device=device)
    for a, b in zip(run(op, op, args), run(op, op, args)):
        assert torch.equal(a, b)


@each_device
@each_op
def test_inputs_that_are_not_written_stay_as_they_are(op, device):
    require_kernel(op)
    args = example(op, "mix", device=device)
    before = map_tensors(clone, args)
    op(*args)
    for name, old, new in zip(op.__signature__.parameters, before, args):
        if name not in op.mutates:
            for a, b in zip(flatten(old), flatten(new)):
                assert torch.equal(a, b), name


@not_interpreted
@each_device
@each_op
def test_float64_is_the_reference_itself(op, device):
    args = example(op, "fp64", device=device)
    for a, b in zip(run(op, op, args), run(op.reference, op, args)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@not_interpreted
@each_device
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_gradients_agree_with_finite_differences_in_float64(op, device):
    args = example(op, "fp64", device=device)
    if op.is_backward:
        # a gradient of a gradient: the recomputation that every operator without a fused backward has
        wanted = [clone(arg).requires_grad_() for arg in args[:2]]
        args = (*wanted, *args[2:])
    else:
        args = op.wanting_gradients(args)
    assert torch.autograd.gradcheck(op, args, fast_mode=True, atol=1e-6)


@not_interpreted
@each_device
@pytest.mark.parametrize("op", FORWARD, ids=lambda op: op.name)
def test_second_derivatives_agree_with_finite_differences(op, device):
    assert torch.autograd.gradgradcheck(op, op.wanting_gradients(example(op, "fp64", device=device)), fast_mode=True)


@not_interpreted
@each_device
@pytest.mark.parametrize("op,mode,label", cases(DIFFERENTIABLE, ["fp64"], without="zero prediction"))
def test_tangents_agree_with_finite_differences(op, mode, label, device):
    args = example(op, mode, label, device)
    generator = torch.Generator().manual_seed(3)

    def tangent(value, name):
        if name in op.constants or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return None
        return torch.randn(value.shape, generator=generator, dtype=value.dtype).to(device)

    tangents = [tangent(value, name) for name, value in zip(op.__signature__.parameters, args)]

    def moved(step):
        return [value if t is None else value + step * t for value, t in zip(args, tangents)]

    with torch.no_grad():
        ahead, behind = (flatten(op.reference(*moved(step))) for step in (1e-6, -1e-6))
    with forward_ad.dual_level():
        duals = [value if t is None else forward_ad.make_dual(value, t) for value, t in zip(args, tangents)]
        found = [forward_ad.unpack_dual(output) for output in flatten(op(*duals))]
    for (primal, got), a, b in zip(found, ahead, behind):
        got = torch.zeros_like(primal) if got is None else got  # an output that depends on no input, as an empty one
        torch.testing.assert_close(got, (a - b) / 2e-6, rtol=1e-5, atol=1e-6)


@not_interpreted
@each_device
@each_op
def test_opcheck(op, device):
    args = example(op, "mix", device=device)
    torch.library.opcheck(op.overload, args if op.mutates else op.wanting_gradients(args))


@not_interpreted
@each_device
@each_op
def test_compiles_without_graph_break(op, device):
    torch._dynamo.reset()
    args = example(op, "mix", device=device)
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True)
    for a, b in zip(run(compiled, op, args), run(op, op, args)):
        assert torch.equal(a, b)


@not_interpreted
@each_device
@pytest.mark.parametrize("op", [op for op in FORWARD if op.backward], ids=lambda op: op.name)
def test_compiled_gradients_equal_eager_ones(op, device):
    torch._dynamo.reset()
    args = op.wanting_gradients(example(op, "mix", device=device))
    leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True)
    found = []
    for function in (op, compiled):
        outputs = flatten(function(*args))
        found.append(torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs]))
    for a, b in zip(*found):
        assert torch.equal(a, b)
