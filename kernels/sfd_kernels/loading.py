"""What serves tensors of each device: loads the C++ kernels and tells why a reference runs where it does."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import torch

from sfd_kernels.registry import INTERPRET

_cpu_error: str | None = None


def load_cpu_kernels() -> None:
    """Loads the C++ kernels where they were built; otherwise remembers why not (see `backends`)."""
    global _cpu_error
    folder = Path(__file__).parent
    built = sorted(path for path in folder.glob("_cpu*") if path.suffix in (".so", ".dylib"))
    stored = folder / "build_error.txt"
    if INTERPRET:
        _cpu_error = "not loaded: TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors"
    elif os.environ.get("SFD_KERNELS_CPU") == "reference":
        _cpu_error = "not loaded: SFD_KERNELS_CPU=reference"
    elif not built:
        _cpu_error = stored.read_text() if stored.exists() else "not built: `make setup` builds it with a C++ compiler"
    else:
        try:
            torch.ops.load_library(str(built[0]))
        except OSError as error:
            _cpu_error = f"{built[0].name} does not load: {error}"


def cpu_instruction_set() -> str:
    """What the C++ kernels use here: amx, avx512_bf16, avx512, avx2 or baseline; "none" where there are none."""
    if _cpu_error is not None or not hasattr(torch.ops.sfd_cpu, "capability"):
        return "none"
    return torch.ops.sfd_cpu.capability()


def backends() -> dict[str, str]:
    """What serves tensors of each device and, where it is the reference, why: for `sfd doctor`."""
    if _cpu_error is not None:
        cpu = "triton interpreter" if INTERPRET else f"reference (plain PyTorch); {_cpu_error}"
    else:
        cpu = f"C++ ({cpu_instruction_set()})"
    if importlib.util.find_spec("triton") is None:
        cuda = "reference (plain PyTorch); Triton is not installed: pip install triton"
    else:
        cuda = f"Triton {importlib.metadata.version('triton')}"
    return {"cpu": cpu, "cuda": cuda}
