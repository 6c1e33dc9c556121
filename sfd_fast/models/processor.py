"""What the CPU multiplies in by itself."""

import functools

import torch

BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def capabilities() -> dict[str, bool]:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


@functools.cache
def has_amx() -> bool:
    """Whether the CPU multiplies tiles of bf16."""
    return bool(capabilities().get("amx_bf16"))


def has_bf16_units() -> bool:
    """Whether the CPU multiplies in bf16 itself: tiles, vectors, or both."""
    return any(capabilities().get(name) for name in BF16_UNITS)
