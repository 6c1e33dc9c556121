"""Moments of trajectories: which ones a picture of the three stages shows.

Letters: N samples, H height, W width, h, w of latents.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """One moment: normalised semantic latents (N, C, h, w) and decoded texture (N, H, W, 3) uint8."""

    tau: float
    semantic: np.ndarray
    images: np.ndarray


def spread(states: list[tuple[float, Tensor]], count: int, delta_t: float) -> list[tuple[float, Tensor]]:
    """Of states (tau, x) about `count` at even distances, and those at the borders of the stages always."""
    wanted = np.linspace(0, 1 + delta_t, max(count, 2)).tolist() + [delta_t, 1.0]
    nearest = {min(range(len(states)), key=lambda i: abs(states[i][0] - tau)) for tau in wanted}
    return [states[i] for i in sorted(nearest)]
