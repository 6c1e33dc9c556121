"""The attention function: values and gradients, choice of a library, the calls against the libraries' signatures."""

import ast
import importlib.machinery
import logging
import sys
import types
from pathlib import Path

import pytest
import sfd_kernels
import torch
from torch import Tensor

from sfd_fast.models import attention as module
from sfd_fast.models.attention import BACKENDS, attention, attention_backends, choose

# Where wheels may lie that are read but never imported: `pip install --no-deps --target DIR xformers flash-attn-4`.
SIGNATURES = Path(sys.prefix) / "attention-signatures"

# Parameters that come by position or name, up to the last that matters here, as published.
RECORDED = {
    # flash-attn-4 4.0.0b36, flash_attn/cute/interface.py
    "flash4": "q k v qv gather_kv_indices softmax_scale causal window_size learnable_sink softcap num_splits",
    # flash-attention repository, hopper/flash_attn_interface.py
    "flash3": "q k v softmax_scale causal qv q_descale k_descale v_descale window_size",
    # flash-attn 2.8, flash_attn/flash_attn_interface.py
    "flash2": "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic",
    # xformers 0.0.35, xformers/ops/fmha/__init__.py
    "xformers": "query key value attn_bias p scale",
}
SOURCES = {
    "flash4": ("flash_attn/cute/interface.py", "flash_attn_func"),
    "flash3": ("flash_attn_interface.py", "flash_attn_func"),
    "flash2": ("flash_attn/flash_attn_interface.py", "flash_attn_func"),
    "xformers": ("xformers/ops/fmha/__init__.py", "memory_efficient_attention"),
}
FUNCTION = {name: "memory_efficient_attention" if name == "xformers" else "flash_attn_func" for name in SOURCES}


def naive(q, k, v):
    """Softmax attention in fp64, written as the formula. (B, N, H, d)"""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
    return (weights @ v).transpose(1, 2)


def heads(head_dim, dtype=torch.float32, tokens=20):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, tokens, 3, head_dim, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.fixture
def gpu_of(monkeypatch):
    """Pretends a CUDA device of some compute capability and a set of installed libraries."""

    def pretend(capability, installed):
        monkeypatch.setattr(module, "_capability", lambda device_type: capability if device_type == "cuda" else 0)
        monkeypatch.setattr(module, "_not_installed", lambda name: "" if name in (*installed, "sdpa") else "is absent")

    return pretend


@pytest.fixture
def stand_in_library(monkeypatch):
    """Installs a module whose function notes its arguments and answers with the naive formula."""

    def install(name, *, as_tuple=False, device="cpu"):
        calls = []

        def function(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
            calls.append(options)
            out = naive(q, k, v).to(q.dtype)
            return (out, None) if as_tuple else out

        parts = BACKENDS[name].module.split(".")
        for i in range(len(parts)):
            path = ".".join(parts[: i + 1])
            stand_in = types.ModuleType(path)
            stand_in.__path__ = []
            stand_in.__spec__ = importlib.machinery.ModuleSpec(path, None)
            monkeypatch.setitem(sys.modules, path, stand_in)
        setattr(stand_in, FUNCTION[name], function)
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(capabilities=(), dtypes=()))
        forget()
        return calls

    def forget():
        module._not_installed.cache_clear()
        module._remembered_choice.cache_clear()

    yield install
    forget()


@pytest.mark.parametrize("head_dim", [64, 72])
def test_values_and_gradients_equal_the_formula(head_dim):
    q, k, v = heads(head_dim)
    out = attention(q, k, v)
    expected = naive(q, k, v)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), upstream)
    for gradient, reference in zip(found, torch.autograd.grad(expected, (q, k, v), upstream.double())):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_output_has_the_inputs_dtype(dtype):
    q, k, v = heads(64, dtype)
    out = attention(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=2e-2, atol=2e-2)


def test_v_may_be_a_view_of_packed_qkv():
    packed = torch.randn(2, 9, 3, 4, 16)
    q, k, v = packed.unbind(2)
    torch.testing.assert_close(attention(q, k, v).double(), naive(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "capability, installed, expected",
    [
        (9, ("flash4", "flash3", "flash2", "xformers"), "flash3"),
        (9, ("flash4", "flash2"), "flash4"),
        (10, ("flash4", "flash3", "flash2"), "flash4"),
        (10, ("flash3", "flash2"), "flash2"),
        (8, ("flash4", "flash3", "flash2", "xformers"), "flash2"),
        (8, ("xformers",), "sdpa"),
        (7, ("flash4", "flash3", "flash2", "xformers"), "sdpa"),
        (9, (), "sdpa"),
    ],
)
def test_auto_takes_the_best_installed_library_of_the_device(gpu_of, capability, installed, expected):
    gpu_of(capability, installed)
    for head_dim in (64, 72):
        assert choose("auto", "cuda", torch.bfloat16, head_dim) == expected


def test_auto_passes_over_libraries_that_do_not_fit(gpu_of):
    gpu_of(9, BACKENDS)
    assert choose("auto", "cuda", torch.float32, 72) == "sdpa"
    assert choose("auto", "cuda", torch.float64, 72) == "sdpa"
    assert choose("auto", "cuda", torch.bfloat16, 20) == "sdpa"


@pytest.mark.parametrize(
    ("isa", "of_bf16", "of_fp32"),
    [("amx", "sfd", "sfd"), ("avx512_bf16", "sfd", "sfd"), ("avx512", "sfd", "sfd"), ("avx2", "sfd", "sdpa"),
     ("baseline", "sdpa", "sdpa"), ("none", "sdpa", "sdpa")],
)  # fmt: skip
def test_a_cpu_takes_our_operator_where_it_wins(monkeypatch, isa, of_bf16, of_fp32):
    monkeypatch.setattr(module, "cpu_instruction_set", lambda: isa)
    monkeypatch.setattr(module, "_not_installed", lambda name: "" if name in ("sfd", "sdpa") else "is absent")
    for half in (torch.bfloat16, torch.float16):
        assert choose("auto", "cpu", half, 72) == of_bf16
    assert choose("auto", "cpu", torch.float32, 64) == of_fp32
    assert choose("auto", "cpu", torch.float32, 60) == choose("auto", "cpu", torch.float64, 64) == "sdpa"


def test_our_operator_is_taken_where_it_is_asked_for_and_not_on_cuda(monkeypatch, gpu_of):
    gpu_of(9, ("sfd",))
    monkeypatch.setattr(module, "cpu_instruction_set", lambda: "avx2")
    assert choose("sfd", "cpu", torch.float32, 72) == "sfd"
    with pytest.raises(ValueError, match="serves CPU tensors, not cuda"):
        choose("sfd", "cuda", torch.bfloat16, 72)
    assert choose("auto", "cuda", torch.bfloat16, 72) == "sdpa"


def test_our_operator_without_a_library_names_the_command_that_builds_it(monkeypatch):
    monkeypatch.setattr(module, "cpu_instruction_set", lambda: "none")
    module._not_installed.cache_clear()
    with pytest.raises(ImportError, match="has no C.. operators here .*install it with: SFD_KERNELS_BUILD=require pip"):
        choose("sfd", "cpu", torch.bfloat16, 72)
    module._not_installed.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_operator_gives_what_sdpa_gives(monkeypatch, dtype):
    monkeypatch.setattr(module, "cpu_instruction_set", lambda: "amx")
    given = [tensor.detach().to(dtype).requires_grad_() for tensor in heads(64)]
    found, expected = (attention(*given, backend=name) for name in ("sfd", "sdpa"))
    assert found.dtype == dtype
    close = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, expected, **close)
    ours, theirs = (torch.autograd.grad(y.float().square().sum(), given) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, **{name: 5 * value for name, value in close.items()})


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_for_our_operator_as_for_sdpa(monkeypatch, compiled):
    monkeypatch.setattr(module, "cpu_instruction_set", lambda: "avx2")  # where fp32 alone would be SDPA's
    module._remembered_choice.cache_clear()
    q, k, v = heads(64)
    function = torch.compile(attention, backend="aot_eager", fullgraph=True) if compiled else attention
    with torch.autocast("cpu", torch.bfloat16):
        found = function(q, k, v)
        theirs = attention(q, k, v, backend="sdpa")
    module._remembered_choice.cache_clear()
    assert found.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(found, theirs, rtol=2e-2, atol=2e-2)
    assert torch.equal(found, sfd_kernels.attention(*(x.bfloat16() for x in (q, k, v)))[0])


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*heads(64, torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("compiled", [False, True])
def test_the_reference_is_sdpa(monkeypatch, compiled):
    monkeypatch.setattr(module, "_call_ours", None)
    monkeypatch.setitem(BACKENDS, "sfd", BACKENDS["sfd"]._replace(call=None))
    function = torch.compile(attention, backend="aot_eager", fullgraph=True) if compiled else attention
    q, k, v = heads(64)
    with sfd_kernels.reference_only():
        assert torch.equal(function(q, k, v), attention(q, k, v, backend="sdpa"))


def test_auto_keeps_to_traceable_libraries_inside_torch_compile(gpu_of):
    gpu_of(10, ("flash4", "xformers"))
    assert choose("auto", "cuda", torch.bfloat16, 72, True) == "sdpa"
    gpu_of(9, ("flash4", "flash3"))
    assert choose("auto", "cuda", torch.bfloat16, 72, True) == "flash3"


def test_the_choice_is_said_once(caplog, monkeypatch):
    module._say_once.cache_clear()
    module._remembered_choice.cache_clear()
    monkeypatch.setattr(module, "cpu_instruction_set", lambda: "avx2")
    with caplog.at_level(logging.INFO, "sfd_fast.attention"):
        for _ in range(3):
            attention(*heads(64))
    module._remembered_choice.cache_clear()
    said = [record.message for record in caplog.records if record.name == "sfd_fast.attention"]
    assert said == ["attention: torch SDPA for float32, head_dim 64, cpu"]


@pytest.mark.parametrize("name", ["flash4", "flash3", "flash2", "xformers"])
def test_asking_for_an_absent_library_names_the_command_that_installs_it(gpu_of, name):
    gpu_of(9, ())
    with pytest.raises(ImportError) as error:
        choose(name, "cuda", torch.bfloat16, 64)
    assert f"attention backend '{name}': {BACKENDS[name].package} is absent" in str(error.value)
    assert f"install it with: {BACKENDS[name].install}" in str(error.value)


@pytest.mark.parametrize(
    "dtype, head_dim, device, message",
    [
        (torch.float32, 64, "cuda", "runs float16 or bfloat16, not torch.float32"),
        (torch.bfloat16, 20, "cuda", "needs head_dim to be a multiple of 8 up to 128, not 20"),
        (torch.bfloat16, 64, "cpu", "needs a CUDA device, not cpu"),
    ],
)
def test_asking_for_a_library_that_does_not_fit_says_why(gpu_of, dtype, head_dim, device, message):
    gpu_of(9, BACKENDS)
    with pytest.raises(ValueError, match=f"attention backend 'flash4': flash-attn 4 {message}"):
        choose("flash4", device, dtype, head_dim)


def test_xformers_is_taken_when_asked_for(gpu_of):
    gpu_of(8, ("xformers",))
    assert choose("xformers", "cuda", torch.float32, 72) == "xformers"


def test_an_unknown_library_is_refused_with_the_list():
    with pytest.raises(ValueError, match="unknown attention backend 'flash5'; allowed: auto, flash4, flash3, flash2"):
        attention(*heads(64), backend="flash5")


def test_doctor_rows_say_what_is_usable_and_what_would_install_the_rest():
    rows = {row.name: row for row in attention_backends()}
    assert rows.keys() == BACKENDS.keys()
    assert rows["sdpa"].usable and not rows["sdpa"].why_not
    for row in rows.values():
        assert row.usable == (not row.why_not)
        if "is not installed" in row.why_not:
            assert row.install == BACKENDS[row.name].install


@pytest.mark.parametrize("name, as_tuple", [("flash4", True), ("flash3", True), ("flash3", False), ("flash2", False),
                                            ("xformers", False)])  # fmt: skip
def test_each_adapter_calls_its_library_as_the_signature_wants_and_returns_the_output(stand_in_library, name, as_tuple):
    calls = stand_in_library(name, as_tuple=as_tuple)
    q, k, v = heads(72)
    out = attention(q, k, v, backend=name)
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=1e-5, atol=1e-6)
    assert all(g is not None for g in torch.autograd.grad(out.sum(), (q, k, v)))
    assert set(calls[0]) <= set(RECORDED[name].split()[3:])
    scale = calls[0].get("softmax_scale", calls[0].get("scale"))
    assert scale == pytest.approx(72**-0.5)
    assert not calls[0].get("causal") and not calls[0].get("dropout_p")


@pytest.mark.parametrize("name", SOURCES)
def test_recorded_signatures_equal_the_installed_libraries(name):
    """The libraries' sources are parsed, not imported: importing them needs a GPU build."""
    source, function = SOURCES[name]
    found = [Path(place, source) for place in (*sys.path, SIGNATURES) if Path(place, source).is_file()]
    if not found:
        pytest.skip(f"{BACKENDS[name].package} is not here: pip install --no-deps --target {SIGNATURES} ...")
    definitions = [
        node for node in ast.parse(found[0].read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]  # fmt: skip
    arguments = definitions[0].args
    recorded = RECORDED[name].split()
    assert [argument.arg for argument in arguments.args[: len(recorded)]] == recorded
    assert not arguments.posonlyargs
    assert len(arguments.args) - len(arguments.defaults) == 3  # the adapters pass q, k, v in place, the rest by name


def test_torch_compile_traces_a_traceable_library_without_a_break(stand_in_library):
    stand_in_library("flash3", as_tuple=True)
    q, k, v = heads(64)
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, backend="flash3") * 2, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, k, v).double(), 2 * naive(q, k, v), rtol=1e-5, atol=1e-6)


def test_torch_compile_traces_the_automatic_choice():
    q, k, v = heads(72)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v).double(), naive(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_library_usable_on_this_gpu_equals_the_formula(name, head_dim):
    status = {row.name: row for row in attention_backends(head_dim)}[name]
    if not status.usable:
        pytest.skip(f"{status.package} {status.why_not}")
    q, k, v = (x.detach().cuda().bfloat16().requires_grad_() for x in heads(head_dim, tokens=256))
    out, expected = attention(q, k, v, backend=name), naive(q, k, v)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), upstream)
    for gradient, reference in zip(found, torch.autograd.grad(expected, (q, k, v), upstream.double())):
        torch.testing.assert_close(gradient.double(), reference.double(), rtol=5e-2, atol=5e-2)
