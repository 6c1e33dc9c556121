"""Inputs for tests, report and benchmarks: dtype modes, model sizes and a seeded maker of tensors.

B batch, N tokens, D width, H heads, d head_dim, C channels, F features.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mode:
    """Dtypes of one way to run the network.

    wide: residual stream, weights, noise and data. narrow: what a Linear returns (scale, shift, gate, branch, qkv,
    velocity) and its gradients. state: sampler and optimizer state, clocks, coefficients, losses.
    """

    wide: torch.dtype
    narrow: torch.dtype
    state: torch.dtype = torch.float32


MODES = {
    "fp32": Mode(torch.float32, torch.float32),
    "bf16": Mode(torch.bfloat16, torch.bfloat16),
    "fp16": Mode(torch.float16, torch.float16),
    "mix": Mode(torch.float32, torch.bfloat16),  # what autocast makes of fp32 weights
    "fp64": Mode(torch.float64, torch.float64, torch.float64),
}


@dataclass(frozen=True)
class Size:
    """Shapes of one network and batch. tiny is odd on purpose: no width is a multiple of a vector."""

    name: str
    batch: int
    tokens: int
    width: int
    heads: int
    hidden: int
    texture_channels: int
    semantic_channels: int
    grid: int
    features: int
    layers: int

    def with_batch(self, batch: int) -> "Size":
        return replace(self, batch=batch)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def latent(self) -> tuple[int, int, int, int]:
        return self.batch, self.texture_channels + self.semantic_channels, self.grid, self.grid

    @property
    def is_tiny(self) -> bool:
        return self.name == "tiny"


#             batch tokens width heads hidden  tex sem grid features layers (docs/METHOD.md 3)
SIZES = {
    "tiny": Size("tiny", 3, 7, 36, 3, 23, 3, 2, 3, 37, 2),
    "S": Size("S", 8, 256, 384, 6, 1024, 32, 16, 16, 768, 12),
    "B": Size("B", 8, 256, 768, 12, 2048, 32, 16, 16, 768, 12),
    "XL": Size("XL", 8, 256, 1152, 16, 3072, 32, 16, 16, 768, 28),
    "XXL": Size("XXL", 8, 256, 1536, 24, 4096, 32, 16, 16, 768, 24),
}


class Make:
    """Tensors of a mode on a device, reproducible from a seed."""

    def __init__(self, mode: Mode, device: str, seed: int = 0) -> None:
        self.mode, self.device = mode, device
        self._generator = torch.Generator().manual_seed(seed)

    def _draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Large examples are for measuring: drawing them in fp32 halves the time and the memory.
        precise = torch.float64 if torch.Size(shape).numel() < 1 << 20 else torch.float32
        return torch.randn(shape, generator=self._generator, dtype=precise).to(dtype).to(self.device)

    def wide(self, *shape: int) -> Tensor:
        return self._draw(shape, self.mode.wide)

    def narrow(self, *shape: int) -> Tensor:
        return self._draw(shape, self.mode.narrow)

    def state(self, *shape: int) -> Tensor:
        return self._draw(shape, self.mode.state)

    def uniform(self, *shape: int) -> Tensor:
        """Clocks: in [0, 1), dtype of state."""
        drawn = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return drawn.to(self.mode.state).to(self.device)

    def weight(self, *shape: int) -> Tensor:
        """Around 1, as the weight of a norm is; wide."""
        return (1 + 0.2 * self._draw(shape, torch.float64)).to(self.mode.wide)

    def packed(self, parts: int, batch: int, width: int) -> tuple[Tensor, ...]:
        """`parts` rows (B, D) cut from one (B, parts * D), as modulation arrives from its Linear; narrow, small."""
        return (0.3 * self._draw((batch, parts * width), torch.float64)).to(self.mode.narrow).chunk(parts, dim=1)

    def scalar(self, value: float) -> Tensor:
        """0-dim tensor on the device, dtype of state."""
        return torch.tensor(value, dtype=self.mode.state, device=self.device)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def make_and_size(mode: str, size: str, batch: int | None, device: str, seed: int) -> tuple[Make, Size]:
    """What the examples of an operator are made with, reproducible from the seed.

    mode: fp32, bf16, fp16, mix (autocast), fp64. size: tiny (odd shapes, all variants), S, B, XL, XXL. batch overrides
    the size's own batch. ValueError for an unknown mode or size.
    """
    for given, known, what in ((mode, MODES, "mode"), (size, SIZES, "size")):
        if given not in known:
            raise ValueError(f"unknown {what} '{given}'; allowed: {', '.join(known)}")
    return Make(MODES[mode], device, seed), SIZES[size] if batch is None else SIZES[size].with_batch(batch)
