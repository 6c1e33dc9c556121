"""Attention as one function over (B, N, H, d): flash-attn 4, 3, 2, xformers, cuDNN, torch SDPA or, on CPUs, our own.

B batch, N tokens, H heads, d head_dim (72 in XL, 64 in XXL and B).
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

import sfd_kernels
import torch
import torch.nn.functional as F
from sfd_kernels.loading import cpu_instruction_set
from sfd_kernels.registry import is_reference_only
from torch import Tensor

from sfd_fast.models.attention_speed import fastest, measure

log = logging.getLogger("sfd_fast.attention")

HALF = (torch.float16, torch.bfloat16)


# Each adapter imports its library where it calls it: torch.compile traces such an import, but no stored function.
def _call_flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return _first(flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False))


def _call_flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return _first(flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False))


def _call_flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.flash_attn_interface import flash_attn_func

    in_order = torch.are_deterministic_algorithms_enabled()
    return flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=False, deterministic=in_order
    )


def _call_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v, scale=q.shape[-1] ** -0.5)


def _cast_by_autocast(tensor: Tensor) -> torch.dtype:
    """In which dtype a CPU computes this tensor's attention: torch casts for SDPA, but not for an operator of ours."""
    if tensor.device.type != "cpu" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled("cpu"):
        return tensor.dtype
    return torch.get_autocast_dtype("cpu")


def _call_ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sfd_kernels.attention(*(tensor.to(_cast_by_autocast(tensor)) for tensor in (q, k, v)))[0]


def _call_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, N, d), as views
    return F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5).transpose(1, 2)


def _call_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _call_sdpa(q, k, v)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output alone: flash-attn 4 and early builds of 3 return (out, log-sum-exp), later ones out."""
    return out[0] if isinstance(out, tuple) else out


class Backend(NamedTuple):
    """One attention library: where its function is, how it is called, what it can run."""

    package: str
    """what it is called in messages"""
    module: str
    call: Callable[..., Tensor]
    install: str
    capabilities: tuple[int, ...]
    """major CUDA compute capabilities it runs on, forward and backward; empty: any device, CPU included"""
    dtypes: tuple[torch.dtype, ...]
    """empty: any"""
    max_head_dim: int
    traceable: bool
    """whether torch.compile(fullgraph=True) can trace through it"""
    deterministic: bool
    """whether its backward pass can sum in a fixed order (torch.use_deterministic_algorithms)"""


# Limits as the libraries' own checks state them: flash-attn 4.0.0b36 flash_attn/cute/interface.py (backward needs
# capability 9 or more; 8 <= d <= 128, multiples of 8 everywhere), flash-attn README for 2 and 3, xformers 0.0.35
# ops/fmha/{flash,cutlass}.py. Only flash-attn 2 and 3 register torch operators for both passes.
BACKENDS: dict[str, Backend] = {
    "flash4": Backend(
        "flash-attn 4", "flash_attn.cute", _call_flash4, "pip install flash-attn-4",
        (9, 10, 11, 12), HALF, 128, False, False,
    ),
    "flash3": Backend(
        "flash-attn 3", "flash_attn_interface", _call_flash3,
        'pip install --no-build-isolation "git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper"',
        (9,), HALF, 256, True, False,
    ),
    "flash2": Backend(
        "flash-attn 2", "flash_attn.flash_attn_interface", _call_flash2,
        "pip install --no-build-isolation flash-attn", (8, 9, 10, 11, 12), HALF, 256, True, True,
    ),
    "xformers": Backend(
        "xformers", "xformers.ops", _call_xformers, "pip install xformers",
        (8, 9, 10, 11, 12), (*HALF, torch.float32), 256, False, False,
    ),
    "cudnn": Backend(
        "cuDNN through torch SDPA", "torch.nn.attention", _call_cudnn, "pip install torch",
        (8, 9, 10, 11, 12), HALF, 128, True, False,
    ),
    "sfd": Backend(
        "sfd_kernels' operator for CPUs", "sfd_kernels", _call_ours,
        "SFD_KERNELS_BUILD=require pip install --no-build-isolation -e . (needs a C++20 compiler)",
        (), (*HALF, torch.float32), 256, True, True,
    ),
    "sdpa": Backend(
        "torch SDPA", "torch.nn.functional", _call_sdpa, "pip install torch",
        (), (), 65536, True, True,
    ),
}  # fmt: skip


@functools.cache
def _not_installed(name: str) -> str:
    """Why the library cannot be imported, or an empty string."""
    try:
        found = importlib.util.find_spec(BACKENDS[name].module) is not None
    except ImportError:  # a parent package is absent
        found = False
    if not found:
        return "is not installed"
    try:
        importlib.import_module(BACKENDS[name].module)
    except (ImportError, OSError) as error:  # built for another torch, Python or CUDA
        return f"is installed but does not import ({error})"
    if name == "sfd" and cpu_instruction_set() == "none":
        return f"has no C++ operators here ({sfd_kernels.backends()['cpu'].splitlines()[0]})"
    return ""


def _does_not_fit(name: str, device_type: str, capability: int, dtype: torch.dtype, head_dim: int) -> str:
    """Why this library cannot run such an attention, or an empty string."""
    backend = BACKENDS[name]
    if name == "sfd" and device_type != "cpu":
        return f"serves CPU tensors, not {device_type}"
    if backend.capabilities and device_type != "cuda":
        return f"needs a CUDA device, not {device_type}"
    if backend.capabilities and capability not in backend.capabilities:
        return f"needs CUDA compute capability {' or '.join(map(str, backend.capabilities))}, not {capability}"
    if backend.dtypes and dtype not in backend.dtypes:
        return f"runs {' or '.join(str(d).removeprefix('torch.') for d in backend.dtypes)}, not {dtype}"
    if not backend.deterministic and device_type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return "has no backward pass that sums in a fixed order, which deterministic training asks for"
    if head_dim > backend.max_head_dim or ((backend.capabilities or name == "sfd") and head_dim % 8):
        return f"needs head_dim to be a multiple of 8 up to {backend.max_head_dim}, not {head_dim}"
    return ""


# Against torch SDPA in one process, one thread, head_dim 64 and 72, 16 to 1024 tokens, lesser sets simulated on a
# Sapphire Rapids by holding SDPA to them too. fp32 on AVX2: 0.95 to 1.1 times as fast, so SDPA stays. Not measured: AMD
# (the only CPUs that run avx512_bf16 kernels), ARM (baseline).
WINS_ON = {
    torch.float32: ("amx", "avx512_bf16", "avx512"),
    torch.bfloat16: ("amx", "avx512_bf16", "avx512", "avx2"),
    torch.float16: ("amx", "avx512_bf16", "avx512", "avx2"),
}
"""instruction sets of sfd_kernels on which our operator is faster than torch SDPA, by dtype"""


def _wins(name: str, dtype: torch.dtype) -> bool:
    """Whether "auto" may take it: what stands before SDPA on a CPU must be faster there."""
    return name != "sfd" or cpu_instruction_set() in WINS_ON[dtype]


def _order(capability: int) -> tuple[str, ...]:
    """Best first, where nothing was measured. flash-attn 3 is written for Hopper (capability 9), 4 for Blackwell.

    xformers stands behind SDPA, so "auto" never takes it: torch carries the same flash 2 and CUTLASS kernels and
    cuDNN's, and a wheel built for another torch imports without its own.
    """
    newest = ("flash3", "flash4") if capability == 9 else ("flash4", "flash3")
    return (*newest, "flash2", "sfd", "sdpa", "cudnn", "xformers")


def _capability(device_type: str) -> int:
    return torch.cuda.get_device_capability()[0] if device_type == "cuda" else 0


@functools.cache
def _say_once(message: str) -> None:
    log.info(message)


# torch.compile evaluates the choice once while tracing and keeps the name as a constant.
@torch.compiler.assume_constant_result
def choose(backend: str, device_type: str, dtype: torch.dtype, head_dim: int, tracing: bool = False) -> str:
    """Name of the library that runs such an attention; said once through the log of sfd_fast.attention.

    backend: "auto" takes the best that is installed and fits; a name insists on it. tracing: inside torch.compile,
    where "auto" passes over libraries that would break the graph. Nothing is measured here.
    Raises ValueError for an unknown name or one that does not fit, ImportError (with the command that installs it) for
    one that is absent.
    """
    capability = _capability(device_type)
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"unknown attention backend '{backend}'; allowed: auto, {', '.join(BACKENDS)}")
        package, install = BACKENDS[backend].package, BACKENDS[backend].install
        if missing := _not_installed(backend):
            raise ImportError(f"attention backend '{backend}': {package} {missing}; install it with: {install}")
        if reason := _does_not_fit(backend, device_type, capability, dtype, head_dim):
            raise ValueError(f"attention backend '{backend}': {package} {reason}; use 'auto' or 'sdpa'")
        _say_once(f"attention: {package} (asked for)")
        return backend
    name = candidates(device_type, dtype, head_dim, tracing)[0]
    kind = f"{str(dtype).removeprefix('torch.')}, head_dim {head_dim}, {device_type}"
    _say_once(f"attention: {BACKENDS[name].package} for {kind}")
    return name


def candidates(device_type: str, dtype: torch.dtype, head_dim: int, tracing: bool = False) -> list[str]:
    """What "auto" chooses from: installed and able to run such an attention; best first; never empty.

    xformers is left out, see `_order`.
    """
    capability = _capability(device_type)
    return [
        name
        for name in _order(capability)
        if name != "xformers"
        and not _does_not_fit(name, device_type, capability, dtype, head_dim)
        and _wins(name, dtype)
        and (BACKENDS[name].traceable or not tracing)
        and not _not_installed(name)
    ]


@functools.cache
def _remembered_choice(
    backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], training: bool, in_order: bool
) -> str:
    """As `choose`, but "auto" on CUDA takes the fastest candidate. in_order is part of the key alone."""
    names = candidates(device.type, dtype, shape[-1]) if backend == "auto" else []
    if len(names) < 2 or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return choose(backend, device.type, dtype, shape[-1])
    name = fastest({name: BACKENDS[name].call for name in names}, shape, dtype, device, training)
    _say_once(f"attention: {BACKENDS[name].package} for {shape}, {dtype}, the fastest of {', '.join(names)}")
    return name


def measured_backends(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str, *, training: bool
) -> dict[str, float]:
    """Milliseconds of every candidate for q, k and v of that shape (B, N, H, d), and its backward pass in training."""
    device = torch.device(device)
    names = candidates(device.type, dtype, shape[-1])
    return measure({name: BACKENDS[name].call for name in names}, shape, dtype, device, training)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head, without mask or dropout.

    q, k, v: (B, N, H, d), last dimension contiguous (v may be a strided view of packed qkv), fp32, fp16 or bf16.
    Returns (B, N, H, d) in the same dtype; under autocast SDPA and our operator cast to the autocast dtype first.
    Inside sfd_kernels.reference_only() it is SDPA. Raises as `choose`.
    """
    if is_reference_only():
        return _call_sdpa(q, k, v)
    dtype = _cast_by_autocast(q)
    if torch.compiler.is_compiling():
        name = choose(backend, q.device.type, dtype, q.shape[-1], True)
    else:
        training = q.requires_grad and torch.is_grad_enabled()
        in_order = torch.are_deterministic_algorithms_enabled()
        name = _remembered_choice(backend, q.device, dtype, tuple(q.shape), training, in_order)
    return BACKENDS[name].call(q, k, v)


class BackendStatus(NamedTuple):
    """A row of `sfd doctor`."""

    name: str
    package: str
    usable: bool
    why_not: str
    install: str


def attention_backends(head_dim: int = 72, dtype: torch.dtype = torch.bfloat16) -> list[BackendStatus]:
    """Every attention library, whether it can run here with such heads, and if not, why and what would install it."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    capability = _capability(device_type)
    rows = []
    for name in _order(capability):
        missing = _not_installed(name)
        misfit = _does_not_fit(name, device_type, capability, dtype, head_dim)
        why_not = "; ".join(reason for reason in (missing, misfit) if reason)
        install = BACKENDS[name].install if missing else ""
        rows.append(BackendStatus(name, BACKENDS[name].package, not why_not, why_not, install))
    return rows
