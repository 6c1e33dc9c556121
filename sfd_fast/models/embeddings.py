"""What enters the network: patches, clocks, labels, and the fixed tables of token positions.

B batch, C channels, N tokens, D width, d head_dim.
"""

import torch
from torch import Tensor, nn

from sfd_fast.config import ModelConfig

TIMESTEP_FEATURES = 256  # docs/METHOD.md 3
BASE = 10000.0  # of the position embedding's and the rotary embedding's frequencies


def position_embedding(grid: int, width: int) -> Tensor:
    """(grid^2, width): sin then cos of the column's position, then the same of the row's; row-major tokens.

    Frequencies 10000^(-i / (width / 4)). Source: docs/METHOD.md 3 (MAE's fixed 2-D embedding, width axis first).
    """
    frequencies = BASE ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1).float()


def rotary_tables(grid: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (grid^2, d): the first d/2 dims turn with the row, the others with the column.

    Angle of pair i: position * 10000^(-2i / (d/2)); both members of an interleaved pair carry it.
    Source: docs/METHOD.md 3.
    """
    half = head_dim // 2
    frequencies = BASE ** (-torch.arange(0, half, 2).float() / half)
    angles = (torch.arange(grid).float()[:, None] * frequencies).repeat_interleave(2, dim=1)  # (grid, d / 2)
    table = torch.cat([angles.repeat_interleave(grid, dim=0), angles.repeat(grid, 1)], dim=1)
    return table.cos(), table.sin()


class PatchEmbed(nn.Module):
    """Conv2d(C -> D, kernel = stride = patch): (B, C, height, width) -> (B, N, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Linear, SiLU, Linear on the sinusoidal features of a clock: (B, 256) -> (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(features)


class LabelEmbedder(nn.Module):
    """Table of the classes, with "no class" as the last row where labels are dropped: (B,) any integers -> (B, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_labels, config.hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels are {labels.dtype}; they must be whole numbers")
        return self.embedding_table(labels.long())


class RotaryEmbedding(nn.Module):
    """The tables of the 2-D rotary embedding as buffers that stay fp32 when the model is cast."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        cos, sin = rotary_tables(config.grid_size // config.patch_size, config.head_dim)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def _apply(self, fn, recurse: bool = True):
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, table in self._buffers.items():
            if table.dtype in (torch.float16, torch.bfloat16):  # a cast angle would be off by up to 0.4 %
                self._buffers[name] = exact[name].to(table.device)
        return self

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.freqs_cos, self.freqs_sin
