"""The part `facts`: versions, the card, and the two rates that everything else is compared with."""

import importlib.metadata
import platform
import subprocess

import torch
from gpu_part import Part
from timing import machine

PACKAGES = (
    "torch", "triton", "numpy", "liger-kernel", "diffusers", "omegaconf", "safetensors", "deepspeed",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120", "flash-attn", "flash-attn-4", "xformers",
)  # fmt: skip


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"


def card(part: Part) -> None:
    found = torch.cuda.get_device_properties(0)
    part.fact("card", found.name)
    part.fact("compute capability", f"{found.major}.{found.minor}")
    part.fact("multiprocessors", found.multi_processor_count)
    part.fact("memory", found.total_memory / 2**30, "GiB")
    part.fact("CUDA of torch", torch.version.cuda)
    part.fact("cuDNN", torch.backends.cudnn.version())
    part.fact("driver", driver())


def run_part(part: Part) -> None:
    part.fact("python", platform.python_version())
    part.fact("commit", machine("cpu")["commit"])
    for package in PACKAGES:
        part.fact(package, version(package))
    if not part.rehearse:
        card(part)
    part.attempt("copy", lambda: copy_rate(part))
    part.attempt("matrix product", lambda: product_rate(part))


def copy_rate(part: Part) -> None:
    size = 1 << 10 if part.rehearse else 1 << 30
    source = torch.randn(size // 4, device=part.device)
    target = torch.empty_like(source)
    timing = part.device_time(lambda: target.copy_(source))
    part.measured("copy, bytes read and written", 2 * size / timing.median / 1e6, "GB/s", ms=timing.median)


def product_rate(part: Part) -> None:
    """On random numbers: zeros run faster than data."""
    side = 32 if part.rehearse else 8192
    left, right = (torch.randn(side, side, device=part.device, dtype=torch.bfloat16) for _ in range(2))
    timing = part.device_time(lambda: left @ right)
    part.measured(f"bf16 matrix product of side {side}", 2 * side**3 / timing.median / 1e9, "TFLOP/s", ms=timing.median)
