"""Dormand-Prince 5(4) with a step size per sample, restarted at every stage border.

An image must not depend on the other images of its batch, so every sample has its own time, step and error norm; a
sample that is done waits, unchanged, for the others. The controller is torchdiffeq's: with one sample and its
`step_t` option at the border both take the same steps.
Letters: B batch, C channels, H height, W width.
"""

import torch
from torch import Tensor

from sfd_fast.config import SamplerConfig
from sfd_fast.diffusion.transport import clocks, join_latents, split_latents, stage_mask
from sfd_fast.sampling.guidance import Guided, Velocity
from sfd_fast.sampling.solvers import Callback, stage_borders

# Dormand and Prince (1980) with Shampine's error weights, as in torchdiffeq.
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
MATRIX = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (
    35 / 384 - 1951 / 21600, 0.0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720, -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300, -1 / 60,
)  # fmt: skip
SAFETY, LARGEST_FACTOR, SMALLEST_FACTOR, ORDER = 0.9, 10.0, 0.2, 5  # torchdiffeq's controller
MAX_STEPS = 10_000


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each sample: (B, ...) -> (B,) float64."""
    return x.flatten(1).pow(2).mean(1).sqrt().double()


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).view(-1, 1, 1, 1)


def _initial_step(drift: Velocity, start: Tensor, y: Tensor, f: Tensor, atol: float, rtol: float) -> Tensor:
    """First step size of each sample (B,). Source: Hairer, Norsett, Wanner, Solving ODEs I, section II.4."""
    scale = atol + rtol * y.abs()
    size, slope = _rms(y / scale), _rms(f / scale)
    guess = torch.where((size < 1e-5) | (slope < 1e-5), 1e-6, 0.01 * size / slope)
    bend = _rms((drift(y + _column(guess, y) * f, start + guess) - f) / scale) / guess
    steepest = torch.maximum(slope, bend)
    flat = steepest <= 1e-15
    step = torch.where(flat, (guess * 1e-3).clamp(min=1e-6), (0.01 / steepest.clamp(min=1e-15)) ** (1 / ORDER))
    return torch.minimum(100 * guess, step)


def _integrate(drift: Velocity, y: Tensor, start: float, end: float, atol: float, rtol: float) -> Tensor:
    """y at `end` from y at `start`, each sample with its own steps, the last one cut to hit `end`."""
    tau = torch.full((len(y),), start, dtype=torch.float64, device=y.device)
    f = drift(y, tau)
    step = _initial_step(drift, tau, y, f, atol, rtol)
    for _ in range(MAX_STEPS):
        active = tau < end
        if not active.any():
            return y
        last = tau + step >= end
        h = torch.where(active, torch.where(last, end - tau, step), 0.0)
        slopes = [f]
        for node, row in zip(NODES[1:], MATRIX[1:]):
            y_next = y + sum(_column(a * h, y) * k for a, k in zip(row, slopes) if a != 0)
            slopes.append(drift(y_next, tau + node * h))
        error = sum(_column(e * h, y) * k for e, k in zip(ERROR, slopes) if e != 0)
        ratio = _rms(error / (atol + rtol * torch.maximum(y.abs(), y_next.abs())))
        if not torch.isfinite(ratio).all():
            sample = int((~torch.isfinite(ratio)).nonzero()[0])
            raise ValueError(
                f"the velocity of sample {sample} of the batch is not finite near tau {tau[sample].item():.4f}: check "
                "the weights for NaN, or sample in fp32"
            )
        accept = active & (ratio <= 1)
        tau = torch.where(accept, torch.where(last, end, tau + h), tau)
        y = torch.where(_column(accept, y).bool(), y_next, y)
        f = torch.where(_column(accept, y).bool(), slopes[-1], f)
        smallest = torch.full_like(ratio, SMALLEST_FACTOR).masked_fill(ratio < 1, 1.0)
        factor = torch.maximum(SAFETY / ratio.clamp(min=1e-300) ** (1 / ORDER), smallest).clamp(max=LARGEST_FACTOR)
        step = torch.where(active, h * factor, step)
        if not (tau + step > tau).all():
            break
    reason = f"{MAX_STEPS} steps were not enough" if (tau + step > tau).all() else "the step has shrunk to nothing"
    raise ValueError(
        f"dopri5 cannot reach tau {end} within its tolerances (atol {atol}, rtol {rtol}): {reason} (smallest step now "
        f"{step.min().item():.1e}); raise sampler.rtol and sampler.atol, or use a solver with fixed steps"
    )


def sample_dopri5(
    velocity: Velocity,
    x0: Tensor,
    delta_t: float,
    config: SamplerConfig,
    num_texture_channels: int,
    callback: Callback | None,
) -> Tensor:
    """Integrate over tau in [0, 1 + delta_t] with adaptive steps, stage by stage; see sfd_fast.sampling.sampler.sample.

    The error norm of a sample is the RMS over all its values of error / (atol + rtol max(|x|, |x_next|)). Deciding
    whether all samples are done reads one number back to the host at every step. In a stage none of whose moving
    streams is guided the weak velocity is left out. callback(stages done, tau, x) after each stage.
    Raises ValueError where the velocity is not finite or the tolerances cannot be met.
    """
    x = x0
    borders = stage_borders(delta_t)
    for number, (start, end) in enumerate(zip(borders, borders[1:]), 1):
        mask = stage_mask(start, end, delta_t)
        field = velocity
        if isinstance(velocity, Guided):
            field = velocity.needed(torch.tensor(end, dtype=x0.dtype), mask)

        def drift(y: Tensor, tau: Tensor, mask: tuple[bool, bool] = mask, field: Velocity = field) -> Tensor:
            times = (t.to(y.dtype) for t in clocks(tau, delta_t))
            parts = split_latents(field(y, *times).to(y.dtype), num_texture_channels)
            return join_latents(*(part if moves else torch.zeros_like(part) for part, moves in zip(parts, mask)))

        x = _integrate(drift, x, start, end, config.atol, config.rtol)
        changed = None if callback is None else callback(number, end, x)
        x = x if changed is None else changed.to(x)
    return x
