"""The offline report: what the Triton kernels compile to, and that each of its checks can fail."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from sfd_kernels.registry import INTERPRET, OPS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"),
    pytest.mark.skipif(INTERPRET, reason="compiles kernels; TRITON_INTERPRET=1 makes them interpreted functions"),
]
COMMITTED = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "triton_report.json"
SIZED = [
    "gated_residual_norm_modulate",
    "gated_residual_norm_modulate_backward",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "rms_norm_modulate",
    "rms_norm_modulate_backward",
    "swiglu",
    "swiglu_backward",
]
"""operators whose shapes differ between XL, XXL and B"""
ON_CUDA = {name for name, op in OPS.items() if not op.on_cuda}
"""operators that have a Triton kernel; the others say what serves CUDA tensors (test_registry.py)"""


@pytest.fixture(scope="module")
def found():
    from sfd_kernels.offline.report import rows

    return rows(archs=[90], modes=["mix"], sizes=["XL"])


def test_every_operator_with_a_triton_kernel_has_a_row(found):
    assert {row["operator"] for row in found} == ON_CUDA


def test_an_operator_for_cpus_alone_is_refused_with_what_serves_cuda_tensors():
    from sfd_kernels.offline.report import rows

    with pytest.raises(ValueError, match="attention has no Triton kernel: libraries serve it"):
        rows(["swiglu", "attention"])


def test_no_spill_wide_accesses_and_hardly_a_byte_too_many_at_xl(found):
    from sfd_kernels.offline.report import faults

    assert faults(found) == []


def test_rows_hold_the_promised_columns(found):
    promised = "operator kernel pass arch dtype shape registers spills shared_bytes occupancy widest_access_bits bytes"
    promised += " least_bytes layout_conversions intensity_flop_per_byte predicted_us"
    for row in found:
        assert set(promised.split()) <= set(row)


def test_large_tensors_of_a_known_launch_are_found(found):
    (row,) = [row for row in found if row["operator"] == "gated_residual_norm_modulate"]
    assert set(row["large_tensor_bits"]) == {"x", "branch", "x_new", "y"}
    elements = 32 * 256 * 1152
    assert row["loaded"]["x"] == 4 * elements and row["stored"]["y"] == 2 * elements
    assert row["predicted_us"] == pytest.approx(row["bytes"] / 3.0e12 * 1e6, abs=0.01)


@pytest.mark.parametrize(
    "size,mode,arch",
    [("XL", "bf16", 80), ("XXL", "mix", 100), ("XXL", "bf16", 90), ("B", "fp32", 90), ("B", "mix", 80)],
)
def test_other_sizes_compile_without_spills_in_wide_accesses(size, mode, arch):
    from sfd_kernels.offline.compile import launches_of

    for name in SIZED:
        for launch in launches_of(OPS[name], mode, size):
            compiled = launch.compile(arch)
            assert compiled.spill_bytes == 0, name
            assert compiled.large_access_bits, name
            assert set(compiled.large_access_bits.values()) == {128}, (name, compiled.large_access_bits)


def test_spill_is_seen():
    from sfd_kernels.offline.compile import launches_of

    launch = launches_of(OPS["gated_residual_norm_modulate_backward"], "mix", "XL")[0]
    starved = dataclasses.replace(launch, meta=launch.meta | {"maxnreg": 64})
    assert starved.compile(90).spill_bytes > 0


def test_narrow_access_is_seen():
    """The hidden width of L, 2730, puts `up` at 4-byte alignment."""
    from sfd_kernels.offline.compile import record
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(32, 256, 2 * 2730, dtype=torch.bfloat16, device="cuda:0")
        (launch,) = record(OPS["swiglu"], (x,))
    assert launch.compile(90).large_access_bits == {"x": 32, "y": 32}


def test_misaligned_view_is_seen():
    from sfd_kernels.offline.compile import record
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(32 * 256 * 512 + 8, dtype=torch.float32, device="cuda:0")
        views = [x.as_strided((32, 256, 512), (256 * 512, 512, 1), offset) for offset in (4, 1)]
        (aligned,), (shifted,) = (record(OPS["swiglu"], (view,)) for view in views)
    assert aligned.compile(90).large_access_bits["x"] == 128
    assert shifted.compile(90).large_access_bits["x"] == 32


def test_launch_function_that_waits_for_the_device_is_an_error(monkeypatch):
    from sfd_kernels.offline.compile import launches_of
    from torch._subclasses.fake_tensor import DataDependentOutputException

    op = OPS["swiglu"]
    op.load_triton()
    monkeypatch.setattr(op, "triton_kernel", lambda x: x.sum().item())
    with pytest.raises(DataDependentOutputException):
        launches_of(op, "mix", "B")


@pytest.mark.parametrize("name", ["masked_velocity_update", "adamw_ema_step"])
def test_mutating_operator_runs_no_tensor_operation_beside_its_kernels(name):
    """So it allocates nothing, and its launches can be captured and replayed."""
    from sfd_kernels.offline.compile import example, record
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    OPS[name].load_triton()
    with FakeTensorMode():
        args = example(OPS[name], "mix", "B")[1]
        with Listener():
            assert record(OPS[name], args)
            assert called == []
            torch.empty(1)
            assert called  # the listener hears


def test_float64_and_unknown_dtypes_launch_nothing():
    from sfd_kernels.offline.compile import launches_of

    for op in OPS.values():
        if not op.name.startswith("philox"):
            assert launches_of(op, "fp64", "B", batch=2) == [], op.name


GOOD = {
    "operator": "swiglu", "kernel": "forward", "arch": 90, "dtype": "mix", "size": "XL", "spills": 0,
    "large_tensor_bits": {"x": 128}, "bytes_over_least": 1.05,
}  # fmt: skip


@pytest.mark.parametrize(
    "change,said",
    [
        ({}, None),
        ({"spills": 8}, "spills 8 bytes"),
        ({"large_tensor_bits": {"x": 64}}, "carries x in 64-bit"),
        ({"bytes_over_least": 1.051}, "moves 1.051"),
        ({"operator": "rms_norm_modulate_backward", "bytes_over_least": 1.1}, None),
        ({"operator": "rms_norm_modulate_backward", "bytes_over_least": 1.101}, "moves 1.101"),
    ],
)
def test_faults_say_what_is_wrong(change, said):
    from sfd_kernels.offline.report import faults

    found = faults([GOOD | change])
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_occupancy_follows_the_scarcest_resource():
    from sfd_kernels.offline.compile import Compiled

    class Kernel:
        class metadata:
            num_warps, shared = 8, 100 * 1024

    compiled = Compiled(None, 90, Kernel)
    compiled.__dict__["_resources"] = {"REG": 128, "STACK": 0, "LOCAL": 0}
    assert compiled.programs_per_multiprocessor == 2  # 65536 registers / (128 * 256); 228 KB / 101 KB
    assert compiled.occupancy == 16 / 64
    assert dataclasses.replace(compiled, arch=80).__class__ is Compiled
    small = Compiled(None, 80, Kernel)
    small.__dict__["_resources"] = {"REG": 32, "STACK": 0, "LOCAL": 0}
    assert small.programs_per_multiprocessor == 1  # 164 KB / 101 KB


def test_command_writes_json_csv_and_cubins(tmp_path, capsys):
    from sfd_kernels.offline.report import main

    arguments = ["--operator", "noise_latents", "--arch", "80", "90", "--dtype", "fp32", "--size", "B"]
    outputs = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"), "--dump", str(tmp_path / "cubins")]
    assert main(arguments + outputs) == 0
    assert "no faults" in capsys.readouterr().out
    assert [row["arch"] for row in json.loads((tmp_path / "r.json").read_text())] == [80, 90]
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 3
    cubins = sorted((tmp_path / "cubins").iterdir())
    assert len(cubins) == 2 and all(cubin.read_bytes()[:4] == b"\x7fELF" for cubin in cubins)


@pytest.mark.parametrize("arguments,said", [(["--operator", "swigloo"], "swigloo"), (["--arch", "70"], "70")])
def test_command_names_what_it_does_not_know(arguments, said, capsys):
    from sfd_kernels.offline.report import main

    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_missing_triton_is_named_with_its_install_command():
    code = "import sys; sys.modules['triton'] = None; import sfd_kernels.offline.report"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "pip install 'triton>=3.6'" in done.stderr


def test_committed_report_is_complete_and_without_faults():
    from sfd_kernels.offline.compile import MULTIPROCESSORS
    from sfd_kernels.offline.report import MODES, SIZES, faults

    committed = json.loads(COMMITTED.read_text())
    covered = {(row["operator"], row["arch"], row["dtype"], row["size"]) for row in committed}
    assert covered == set(product(ON_CUDA, MULTIPROCESSORS, MODES, SIZES))
    assert faults(committed) == []


def test_committed_report_is_that_of_these_kernels(found):
    committed = {
        (row["operator"], row["kernel"]): row
        for row in json.loads(COMMITTED.read_text())
        if (row["arch"], row["dtype"], row["size"]) == (90, "mix", "XL")
    }
    for row in found:
        before = committed[row["operator"], row["kernel"]]
        for column in ("programs", "num_warps", "bytes", "least_bytes", "widest_access_bits"):
            assert row[column] == before[column], (
                f"{row['operator']}: {column}; run python -m sfd_kernels.offline.report --json"
            )
