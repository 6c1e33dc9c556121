"""The registry: dispatch, hooks of the backends, reference_only, mutation rules, and what an import needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sfd_kernels
import torch
from harness.kernel_cases import DEVICES, clone, example, flatten, map_tensors
from sfd_kernels import registry
from sfd_kernels.ops.qk_norm_rope import qk_norm_rope_backward
from sfd_kernels.registry import OPS
from torch.autograd import forward_ad

ROOT = Path(__file__).resolve().parents[2]
MUTATING = [op for op in OPS.values() if op.mutates]
each_device = pytest.mark.parametrize("device", DEVICES)


def python(code, **environment):
    """Standard output of a fresh interpreter that runs code in the repository root."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def doubled():
    """An operator of these tests, twice its input; it stays out of the registry that other tests walk."""

    def test_doubled(x: torch.Tensor, times: int) -> torch.Tensor:
        return 2 * x

    test_doubled.__module__ = "nowhere.no_such_kernel_file"
    op = registry.Op(test_doubled, examples=lambda make, size: iter([]), flops=lambda *args: 3)
    del OPS["test_doubled"]
    return op


def test_every_operator_states_its_formula_and_its_costs():
    for op in OPS.values():
        label, args = next(op.examples())
        assert label and len(op.__doc__) > 60
        assert op.bytes(*args) > 0 and op.flops(*args) > 0
        assert op.reference.__name__ == op.name == op.overload._schema.name.removeprefix("sfd::")


def test_every_operator_that_is_exported_is_registered_and_the_other_way_round():
    exported = {name for name in sfd_kernels.__all__ if isinstance(getattr(sfd_kernels, name), registry.Op)}
    assert exported == {name for name, op in OPS.items() if not op.is_backward}


def test_every_operator_has_a_triton_kernel_or_says_what_serves_cuda_tensors():
    files = {path.stem for path in (ROOT / "kernels" / "sfd_kernels" / "triton").glob("*.py")}
    for op in OPS.values():
        assert (op.module in files) == (not op.on_cuda), op.name
        assert not op.on_cuda or len(op.on_cuda) > 20


def test_unknown_mode_and_size_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="fp32, bf16, fp16, mix, fp64"):
        next(sfd_kernels.swiglu.examples("int8"))
    with pytest.raises(ValueError, match="tiny, S, B, XL, XXL"):
        next(sfd_kernels.swiglu.examples(size="huge"))


def test_arguments_by_name_equal_arguments_by_position():
    x, weight, shift, scale, eps = example(sfd_kernels.rms_norm_modulate)
    named = sfd_kernels.rms_norm_modulate(x, weight, eps=eps, scale=scale, shift=shift)
    assert torch.equal(named, sfd_kernels.rms_norm_modulate(x, weight, shift, scale, eps))


@pytest.mark.parametrize("wrong", [{"eps": 1e-6}, {"shift": None, "scale": None, "eps": 0.0, "bias": 1}])
def test_missing_or_unknown_argument_names_are_refused(wrong):
    x, weight, *_ = example(sfd_kernels.rms_norm_modulate)
    with pytest.raises(TypeError, match="takes x, weight, shift, scale, eps"):
        sfd_kernels.rms_norm_modulate(x, weight, **wrong)


def test_reference_only_runs_no_operator_of_ours():
    x = example(sfd_kernels.swiglu)[0].requires_grad_()
    assert "swiglu" in type(sfd_kernels.swiglu(x).grad_fn).__name__.lower()
    with sfd_kernels.reference_only():
        nested = sfd_kernels.swiglu(x)
        with sfd_kernels.reference_only():
            pass
        after = sfd_kernels.swiglu(x)
    assert "swiglu" not in type(nested.grad_fn).__name__.lower()
    assert "swiglu" not in type(after.grad_fn).__name__.lower()
    assert "swiglu" in type(sfd_kernels.swiglu(x).grad_fn).__name__.lower()


def test_reference_only_is_left_after_an_error():
    with pytest.raises(KeyError), sfd_kernels.reference_only():
        raise KeyError
    assert not registry.is_reference_only()


def test_compiled_function_follows_reference_only():
    torch._dynamo.reset()
    x = example(sfd_kernels.swiglu)[0]
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda x: sfd_kernels.swiglu(x), backend=backend, fullgraph=True)
    compiled(x)
    with sfd_kernels.reference_only():
        compiled(x)
    assert "sfd.swiglu" in graphs[0] and "sfd.swiglu" not in graphs[1] and "silu" in graphs[1]


def test_torch_func_transforms_differentiate_and_batch_the_reference():
    x = example(sfd_kernels.swiglu, "fp64")[0]
    gradient = torch.func.grad(lambda x: sfd_kernels.swiglu(x).sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(sfd_kernels.swiglu(leaf).sum(), leaf)[0])
    torch.testing.assert_close(torch.func.vmap(sfd_kernels.swiglu)(x), sfd_kernels.swiglu(x))


def test_triton_hook_serves_what_it_can_and_hands_the_rest_to_the_reference(doubled):
    calls = []

    @doubled.triton
    def kernel(x, times):
        calls.append(times)
        return torch.full_like(x, 7.0) if x.dtype == torch.float32 else NotImplemented

    assert doubled._run_triton(torch.ones(2), 1).tolist() == [7, 7]
    assert doubled._run_triton(torch.ones(2, dtype=torch.float64), 2).tolist() == [2, 2]
    assert calls == [1, 2]
    doubled.triton_kernel = None


def test_operator_without_triton_file_runs_its_reference(doubled):
    assert doubled.load_triton() is None
    assert doubled._run_triton(torch.ones(2), 1).tolist() == [2, 2]


def test_default_gradient_is_that_of_the_reference(doubled):
    x = torch.ones(3, requires_grad=True)
    doubled(x, 1).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)
def test_reference_is_an_operator_of_its_own_for_kernels_to_fall_back_on(op):
    args = example(op, "fp64")
    clones = map_tensors(clone, args)
    with torch.no_grad():
        expected, got = op.reference(*args), getattr(torch.ops.sfd_reference, op.name)(*clones)
    pairs = zip(flatten(args), flatten(clones)) if op.mutates else zip(flatten(expected), flatten(got))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@each_device
@pytest.mark.parametrize("op", MUTATING, ids=lambda op: op.name)
def test_version_counters_of_what_is_written_are_bumped(op, device):
    args = example(op, device=device)
    before = [[tensor._version for tensor in flatten(arg)] for arg in args]
    op(*args)
    for name, versions, arg in zip(op.__signature__.parameters, before, args):
        bumped = [tensor._version > version for tensor, version in zip(flatten(arg), versions)]
        assert all(bumped) if name in op.mutates else not any(bumped), name


@each_device
@pytest.mark.parametrize("op", MUTATING, ids=lambda op: op.name)
def test_overwriting_a_tensor_that_autograd_saved_raises(op, device):
    args = example(op, device=device)
    written = flatten(args[0])[0]
    leaf = torch.ones_like(written, requires_grad=True)
    product = (leaf * written).sum()
    op(*args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@each_device
@pytest.mark.parametrize("op", MUTATING, ids=lambda op: op.name)
@pytest.mark.parametrize("call", ["callable", "torch.ops"])
def test_inputs_that_require_grad_are_refused_unless_grad_is_off(op, call, device):
    args = example(op, device=device)
    for position in (0, 3):
        wanting = list(map_tensors(clone, args))
        flatten(wanting[position])[0].requires_grad_()
        function = op if call == "callable" else op.overload
        with pytest.raises(ValueError, match=f"{op.name} writes .* torch.no_grad"):
            function(*wanting)
        with torch.no_grad():
            function(*wanting)


@each_device
@pytest.mark.parametrize("op", MUTATING, ids=lambda op: op.name)
def test_inputs_that_carry_a_tangent_are_refused(op, device):
    with forward_ad.dual_level():
        dual = list(example(op, device=device))
        dual[3] = map_tensors(lambda t: forward_ad.make_dual(t.float(), torch.ones_like(t.float())), dual[3])
        with pytest.raises(ValueError, match=f"{op.name} writes .* carries a tangent"):
            op(*dual)


def test_split_qkv_writes_one_packed_gradient_with_the_one_of_v_inside():
    qkv, *rest = example(sfd_kernels.qk_norm_rope, "fp64")
    qkv.requires_grad_()
    q, k, v = sfd_kernels.split_qkv(qkv, *rest)
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    dq, dk, dv = torch.randn_like(q), torch.randn_like(k), torch.randn_like(v)
    (gradient,) = torch.autograd.grad([q, k, v], qkv, [dq, dk, dv])
    assert torch.equal(gradient, qk_norm_rope_backward(dq, dk, dv, qkv.detach(), *rest)[0])
    assert torch.equal(gradient[:, :, 2], dv)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_split_qkv_differentiates_whichever_output_is_used(used):
    args = example(sfd_kernels.qk_norm_rope, "fp64")
    qkv = args[0].requires_grad_()
    (ours,) = torch.autograd.grad(sfd_kernels.split_qkv(*args)[used].square().sum(), qkv)
    with sfd_kernels.reference_only():
        (expected,) = torch.autograd.grad(sfd_kernels.split_qkv(*args)[used].square().sum(), qkv)
    torch.testing.assert_close(ours, expected)


def test_split_qkv_compiles_to_one_backward_operator():
    torch._dynamo.reset()
    args = example(sfd_kernels.qk_norm_rope)
    qkv = args[0].requires_grad_()
    compiled = torch.compile(lambda *args: sfd_kernels.split_qkv(*args), fullgraph=True, backend="aot_eager")
    found = []
    for function in (sfd_kernels.split_qkv, compiled):
        found.append(torch.autograd.grad(sum(o.square().sum() for o in function(*args)), qkv)[0])
    assert torch.equal(*found)


def test_float_argument_that_differs_does_not_change_the_operator_that_runs():
    x, weight, shift, scale, _ = example(sfd_kernels.rms_norm_modulate)
    assert not torch.equal(
        sfd_kernels.rms_norm_modulate(x, weight, shift, scale, 1e-6),
        sfd_kernels.rms_norm_modulate(x, weight, shift, scale, 1.0),
    )


def test_backends_tell_what_serves_each_device():
    told = sfd_kernels.backends()
    assert set(told) == {"cpu", "cuda"}
    forced = python("import sfd_kernels; print(sfd_kernels.backends()['cpu'])", SFD_KERNELS_CPU="reference")
    assert forced.strip() == "reference (plain PyTorch); not loaded: SFD_KERNELS_CPU=reference"


def test_import_needs_only_torch():
    code = """
import sys
for name in ("triton", "safetensors", "yaml", "scipy", "sfd_fast"):
    sys.modules[name] = None
import torch, sfd_kernels
x = torch.randn(2, 6, requires_grad=True)
sfd_kernels.swiglu(x).sum().backward()
print(sfd_kernels.backends()["cuda"])
"""
    assert python(code).strip() == "reference (plain PyTorch); Triton is not installed: pip install triton"


def test_importing_asks_no_device_and_imports_neither_triton_nor_the_offline_tools():
    code = "import sys, torch, sfd_kernels; print(torch.cuda.is_initialized());"
    code += "print([name for name in sys.modules if name == 'triton' or name.startswith('sfd_kernels.offline')])"
    assert python(code).split() == ["False", "[]"]


def test_folder_named_kernels_does_not_hide_the_package_of_that_name(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'the package from the index'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.whose)"
    assert python(code).strip() == "the package from the index"
