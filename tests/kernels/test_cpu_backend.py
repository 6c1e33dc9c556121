"""The C++ library: its build, its instruction sets, threads, layouts, streaming stores and elementary functions.

test_ops.py shows that every operator is accurate in every dtype mode; here lesser instruction sets repeat that.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sfd_kernels
import torch
from harness.kernel_cases import assert_accurate, example, flatten, map_tensors, run, to_double
from sfd_kernels import backends, philox_bits, philox_normal, swiglu
from sfd_kernels.registry import INTERPRET, OPS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "sfd_kernels"
INSTALLED = Path(sfd_kernels.__file__).parent
IS_X86_LINUX = sys.platform == "linux" and platform.machine() == "x86_64"
DISABLED = INTERPRET or os.environ.get("SFD_KERNELS_CPU") == "reference"
LOADED = backends()["cpu"].startswith("C++")

needs_library = pytest.mark.skipif(not LOADED, reason=f"the C++ operators are not loaded: {backends()['cpu'][:200]}")
each_op = pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)


def python(script: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


# Build ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DISABLED, reason="the library is switched off by the environment")
@pytest.mark.skipif(not IS_X86_LINUX or shutil.which("c++") is None, reason="no C++ compiler, or not x86-64 Linux")
def test_library_is_built_and_loaded_where_there_is_a_compiler():
    assert LOADED, backends()["cpu"]


def build(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess, Path]:
    """setup.py build_ext of a copy of the sources; returns the run and the folder that would be packaged."""
    source = tmp_path / "source"
    (source / "kernels").mkdir(parents=True)
    for name in ("setup.py", "kernels/CMakeLists.txt", "kernels/cpu_build.py"):
        shutil.copy(ROOT / name, source / name)
    ignored = shutil.ignore_patterns("*.so", "*.dylib", "__pycache__", "build_error.txt")
    shutil.copytree(SOURCES, source / "kernels" / "sfd_kernels", ignore=ignored)
    target = tmp_path / "lib"
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(target), "--build-temp", str(tmp_path / "temp")],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done, target / "sfd_kernels"


def test_failed_build_installs_and_keeps_the_compilers_error(tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'no such instruction: frobnicate' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done, packaged = build(tmp_path, CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert "frobnicate" in (packaged / "build_error.txt").read_text()
    assert not list(packaged.glob("_cpu*"))
    assert "plain PyTorch" in done.stdout + done.stderr


def test_failed_build_fails_the_install_where_it_is_required(tmp_path):
    done, packaged = build(tmp_path, CXX="/nonexistent/c++", SFD_KERNELS_BUILD="require")
    assert done.returncode != 0
    assert not packaged.exists()


def test_build_can_be_switched_off(tmp_path):
    done, packaged = build(tmp_path, SFD_KERNELS_BUILD="0")
    assert done.returncode == 0
    assert "SFD_KERNELS_BUILD=0" in (packaged / "build_error.txt").read_text()


@needs_library
@pytest.mark.skipif(not IS_X86_LINUX or shutil.which("nm") is None, reason="needs nm and an ELF library")
def test_library_uses_only_the_stable_interface_of_torch():
    """C++ symbols of c10, at or torch change between versions; one binary serves them all only without any."""
    command = ["nm", "-D", "--undefined-only", str(INSTALLED / "_cpu.so")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    symbols = [line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()]
    from_torch = [name for name in symbols if "torch" in name]
    assert any(name.startswith("aoti_torch_") for name in from_torch)
    assert all(re.fullmatch(r"(aoti_)?torch_\w+", name) for name in from_torch), from_torch
    assert not [name for name in symbols if re.match(r"_ZNK?(2at|3c10)", name)]


@needs_library
@each_op
def test_operator_has_a_cpu_kernel(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sfd::{op.name}", "CPU")


@needs_library
def test_loading_leaves_denormal_numbers_alone():
    """A library linked with -ffast-math sets flush-to-zero for the whole process when it is loaded."""
    script = (
        "import numpy, torch, sfd_kernels; assert sfd_kernels.backends()['cpu'].startswith('C++');"
        "print(numpy.float32(1e-40) * numpy.float32(0.5) > 0, (torch.full((64,), 1e-40) * 0.5 > 0).all().item())"
    )
    assert python(script).stdout.split() == ["True", "True"]


# Instruction sets ----------------------------------------------------------------------------------------------------


ISAS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]  # each holds those before it


@needs_library
@pytest.mark.skipif(not IS_X86_LINUX, reason="other machines have one instruction set")
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "baseline"])
def test_lesser_instruction_set_is_as_accurate(isa):
    """The tests of accuracy, once more in a process that is told to do without the machine's best instructions."""
    best = torch.ops.sfd_cpu.capability()
    if ISAS.index(best) <= ISAS.index(isa):
        pytest.skip(f"this process runs {best} kernels already")
    names, chosen = ["test_attention.py"], "attention"  # alone has kernels for more sets than these two
    if isa in ("avx2", "baseline"):
        names += ["test_ops.py", "test_cpu_backend.py"]
        chosen = "test_attention or error_is_at_most_twice or elementary or (streaming and not mix)"
    tests = [str(ROOT / "tests" / "kernels" / name) for name in names]
    done = python(
        "import sys, pytest, torch, sfd_kernels\n"
        f"assert torch.ops.sfd_cpu.capability() == '{isa}'\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-m', 'not gpu', '-k', '{chosen}', *{tests}]))",
        SFD_KERNELS_ISA=isa,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


# Threads and layouts -------------------------------------------------------------------------------------------------


@needs_library
@each_op
def test_results_are_the_same_bits_on_any_number_of_threads(op):
    args = example(op, size="B", batch=2)
    if op.name == "adamw_ema_step":
        args = tuple(arg[:1] if isinstance(arg, list) else arg for arg in args)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(op, op, args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_library
def test_gradients_in_attentions_layout_are_read_as_they_lie():
    op = OPS["qk_norm_rope_backward"]
    args = example(op, size="B", batch=2)
    by_head = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in args[:3]]
    assert not by_head[0].is_contiguous()
    for a, b in zip(op(*args), op(*by_head, *args[3:])):
        assert torch.equal(a, b)


@needs_library
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_mix_without_a_kernel_goes_to_the_reference(dtypes):
    wide, narrow = dtypes
    op = OPS["rms_norm_modulate"]
    x, weight, shift, scale, eps = example(op)
    args = (x.to(wide), weight.to(wide), shift.to(narrow), scale.to(narrow), eps)
    assert torch.equal(op(*args), op.reference(*args))


@needs_library
def test_state_that_is_not_contiguous_is_updated_by_the_reference():
    op = OPS["masked_velocity_update"]
    args = example(op, label="all")
    spread = list(args)
    spread[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(run(op, op, tuple(spread)), run(op, op, args)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# Streaming stores ----------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("mode", ["fp32", "mix"])
@pytest.mark.parametrize(
    "name,batch",
    [
        ("rms_norm_modulate", 2),
        ("rms_norm_modulate_backward", 2),
        ("gated_residual_norm_modulate", 2),
        ("gated_residual_norm_modulate_backward", 2),
        ("qk_norm_rope", 2),
        ("qk_norm_rope_backward", 1),
        ("swiglu", 1),
        ("swiglu_backward", 1),
        ("feature_alignment_loss_backward", 3),
    ],
)
def test_streaming_stores_of_large_outputs_are_accurate(name, batch, mode):
    """Outputs of 2 MiB and more leave by streaming stores; head_dim 72 makes rows that are cut in mid-line."""
    op = OPS[name]
    args = example(op, mode, size="XL", batch=batch if mode == "fp32" else 2 * batch)
    assert max(tensor.numel() * tensor.element_size() for tensor in flatten(op(*args))) >= 2 << 20
    assert_accurate(run(op, op, args), run(op.reference, op, args), run(op.reference, op, to_double(args)), name)


@needs_library
@pytest.mark.parametrize("name", ["flow_matching_loss_backward", "noise_latents"])
def test_streaming_stores_of_large_latents_are_accurate(name):
    op = OPS[name]
    args = example(op, size="XL", batch=48)
    assert_accurate(run(op, op, args), run(op.reference, op, args), run(op.reference, op, to_double(args)), name)


@needs_library
def test_output_of_more_than_32_mib_is_right_also_where_huge_pages_end():
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 2 * 1056, generator=generator)
    x = row.expand(8000, -1).contiguous()  # 33.8 MB of output, no multiple of 2 MiB
    y = swiglu(x)
    assert torch.equal(y, swiglu(row).expand_as(y))


# Elementary functions ------------------------------------------------------------------------------------------------


@needs_library
def test_elementary_exp_is_accurate_over_its_range():
    gate = torch.linspace(-80, 80, 100_003)
    got = swiglu(torch.cat([gate[:, None], torch.ones_like(gate[:, None])], dim=1))[:, 0].double()
    exact = gate.double() * torch.sigmoid(gate.double())
    assert ((got - exact).abs() / exact.abs().clamp_min(1e-30)).max() < 4 * torch.finfo(torch.float32).eps


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_elementary_exp_saturates_and_keeps_nan(dtype):
    gate = torch.tensor([-float("inf"), -1e4, 1e4, float("inf"), float("nan"), 0.0], dtype=dtype)
    got = swiglu(torch.cat([gate[:, None], torch.ones_like(gate[:, None])], dim=1))[:, 0]
    assert got[1].abs() <= 1e-30 and got[2] == gate[2] and got[3] == float("inf") and got[4].isnan() and got[5] == 0
    assert got[0].isnan() or got[0] <= 0  # -inf times a sigmoid of 0


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_elementary_rounding_to_16_bits_is_torchs(dtype):
    """Low-precision copies of weights that do not move (lr 0): every kind of number, ties included."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
    ties = (bits[:1024] & ~0xFFFF) | 0x8000
    half_ties = torch.tensor([2049.0, 2051.0, 65519.0, 65520.0, 6e-8, 2.9e-8, -0.0, 1e-45])
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), half_ties])
    values = values[~values.isnan()].clone()
    copy, zero = torch.empty_like(values, dtype=dtype), torch.zeros_like(values)
    scalars = [torch.tensor(value) for value in (0.0, 0.9, 1.0, 1.0, 0.0)]
    OPS["adamw_ema_step"]([values], [zero], [zero.clone()], [zero.clone()], [], [copy], *scalars, 0.9, 0.999, 1e-8, 0.0)
    assert torch.equal(copy.view(torch.int16), values.to(dtype).view(torch.int16))


@needs_library
def test_elementary_nan_becomes_a_16_bit_nan():
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    label = bits.view(torch.float32).repeat(7)
    for dtype in (torch.bfloat16, torch.float16):
        copy, zero = torch.empty_like(label, dtype=dtype), torch.zeros_like(label)
        scalars = [torch.tensor(value) for value in (0.0, 0.9, 1.0, 1.0, 0.0)]
        OPS["adamw_ema_step"]([label.clone()], [zero], [zero], [zero], [], [copy], *scalars, 0.9, 0.999, 1e-8, 0.0)
        assert copy.isnan().all()


@needs_library
def test_elementary_normals_are_within_two_ulp_of_correct_rounding():
    ids = torch.arange(3) + 2**40
    count = 50_001  # several tasks a sample, the last one cut
    words = OPS["philox_bits"].reference(ids, 7, 3, count + count % 2)
    assert torch.equal(philox_bits(ids, 7, 3, count), words[:, :count])
    a, b = ((words.double() + 0.5) * 2.0**-32).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2 * torch.log(a)), 2 * torch.pi * b
    exact = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]
    ulp = torch.exp2((torch.frexp(exact.abs().clamp_min(1e-30))[1] - 24).double())
    assert ((philox_normal(ids, 7, 3, count).double() - exact).abs() / ulp).max() < 2


@needs_library
def test_elementary_cosines_of_large_angles_are_accurate():
    t = torch.tensor([0.0, 1e-6, 0.5, 1.0, 1000.0, -4095.9, 1e5, 3e8])
    exact = OPS["timestep_features"].reference(t.double(), 256)
    torch.testing.assert_close(OPS["timestep_features"](t, 256).double(), exact, rtol=0, atol=1e-7)


@needs_library
@each_op
def test_wrong_shapes_raise_and_write_nothing_astray(op):
    """A first tensor that is cut short: the kernel must not read past it."""
    args = list(example(op))
    index = next(i for i, arg in enumerate(args) if flatten(arg))
    args[index] = map_tensors(lambda tensor: tensor[..., :-1] if tensor.dim() else tensor, args[index])
    if op.name in ("philox_bits", "philox_normal", "timestep_features", "transpose_with_sums", "total_norm"):
        assert len(run(op, op, tuple(args))) > 0  # any number of samples, times or columns is right
    else:
        with pytest.raises((RuntimeError, ValueError, IndexError)) as reference:
            run(op.reference, op, tuple(args))
        with pytest.raises(type(reference.value)) as ours:
            run(op, op, tuple(args))
        assert str(ours.value) == str(reference.value)


@needs_library
def test_wrong_shape_says_what_the_reference_says_with_gradients_too():
    x, weight, shift, scale, eps = example(OPS["rms_norm_modulate"])
    with pytest.raises(RuntimeError, match=r"size of tensor a \(36\) must match the size of tensor b \(35\)"):
        OPS["rms_norm_modulate"](x.requires_grad_(), weight[:-1], shift, scale, eps)
