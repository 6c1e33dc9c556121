"""`sfd doctor`: what is installed, which backends are usable here, and what would install or enable the rest."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

import sfd_fast
from sfd_fast.config import Settings
from sfd_fast.config.checks import Count

PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "diffusers", "transformers", "torchdiffeq", "pyyaml",
    "scikit-learn", "tensorboard", "deepspeed", "nvidia-dali-cuda120", "flash-attn", "flash-attn-4", "xformers",
)  # fmt: skip


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """Options of `sfd doctor`."""

    head_dim: Count = 72
    """attention heads to ask about: 72 for XL, 64 for the other sizes"""


@dataclass(frozen=True)
class Row:
    """One backend: usable here or not, why, and the command that would install it (empty where none would)."""

    group: Literal["kernels", "attention", "optimizer", "data", "launcher"]
    name: str
    usable: bool
    detail: str
    install: str = ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def kernel_rows() -> list[Row]:
    import sfd_kernels

    served = sfd_kernels.backends()
    has_cpp, has_triton, has_gpu = served["cpu"].startswith("C++"), version("triton") is not None, cuda()
    build = "" if has_cpp else "pip install --no-build-isolation -e . with a C++20 compiler and CMake present"
    cuda_detail = served["cuda"] if has_gpu or not has_triton else f"{served['cuda']} installed; no CUDA device here"
    return [
        Row("kernels", "C++ (CPU tensors)", has_cpp, served["cpu"], build),
        Row("kernels", "Triton (CUDA tensors)", has_triton and has_gpu, cuda_detail,
            "" if has_triton else "pip install 'triton>=3.6'"),
        Row("kernels", "reference (plain PyTorch)", True, "everywhere; sfd_kernels.reference_only() forces it"),
    ]  # fmt: skip


def attention_rows(head_dim: int) -> list[Row]:
    from sfd_fast.models.attention import attention_backends

    return [
        Row("attention", status.name, status.usable, status.why_not or status.package, status.install)
        for status in attention_backends(head_dim=head_dim)
    ]


def optimizer_rows() -> list[Row]:
    rows = [
        Row("optimizer", "adamw_ema", True, "AdamW and EMA in one pass, ours"),
        Row("optimizer", "torch_fused", True, "torch.optim.AdamW(fused=True), EMA in a second pass"),
    ]
    for name, module, install in (
        ("deepspeed", "deepspeed", "DS_BUILD_OPS=0 pip install deepspeed==0.19.8"),
        ("apex", "apex.optimizers", "build github.com/NVIDIA/apex from source (PyPI's apex is something else)"),
    ):
        found = has_module(module)
        why = "CUDA only; no CUDA device here" if not cuda() else "its FusedAdam, EMA in a second pass"
        rows.append(
            Row("optimizer", name, found and cuda(), why if found else "not installed", "" if found else install)
        )
    return rows


def data_rows() -> list[Row]:
    rows = [Row("data", "PIL", True, "exact released preprocessing")]
    found = has_module("nvidia.dali")
    detail = ("decodes on the GPU" if cuda() else "decodes on the CPU (device_id=None)") if found else "not installed"
    return [*rows, Row("data", "DALI", found, detail, "" if found else "pip install 'sfd-fast[dali]'")]


def launcher_rows() -> list[Row]:
    found = version("deepspeed") is not None
    return [
        Row("launcher", "sfd", True, "one process"),
        Row("launcher", "torchrun", has_module("torch.distributed.run"), "comes with torch"),
        Row("launcher", "deepspeed", found, f"deepspeed {version('deepspeed')}" if found else "not installed",
            "" if found else "DS_BUILD_OPS=0 pip install deepspeed==0.19.8"),
        Row("launcher", "srun", shutil.which("srun") is not None,
            "SLURM" if shutil.which("srun") else "no SLURM on this machine"),
    ]  # fmt: skip


def cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def rows(config: DoctorConfig) -> list[Row]:
    """Every backend of every group."""
    return [*kernel_rows(), *attention_rows(config.head_dim), *optimizer_rows(), *data_rows(), *launcher_rows()]


def run_doctor(config: DoctorConfig) -> None:
    """Prints the page."""
    import torch

    device = torch.cuda.get_device_name() if cuda() else "no CUDA device"
    print(f"sfd_fast {sfd_fast.__version__}  Python {platform.python_version()} ({sys.executable})")
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {device}\n")
    print("packages")
    for name in PACKAGES:
        print(f"  {name:<22}{version(name) or 'not installed'}")
    group = None
    for row in rows(config):
        if row.group != group:
            group = row.group
            print(f"\n{group}")
        print(f"  {'ok' if row.usable else '--'}  {row.name:<26}{row.detail}")
        if row.install:
            print(f"  {'':<4}{'':<26}install: {row.install}")
