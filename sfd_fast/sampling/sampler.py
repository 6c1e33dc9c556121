"""The sampling ODE over tau in [0, 1 + delta_t] for any velocity function: fixed grids, and dopri5.

Letters: B batch, C channels, H height, W width.
"""

from functools import partial

import torch
from torch import Tensor

from sfd_fast.config import GuidanceConfig, ModelConfig, SamplerConfig
from sfd_fast.config.sampling import require_null_class
from sfd_fast.diffusion.transport import evaluation_mask, join_latents, released_clocks, split_latents
from sfd_fast.sampling.dopri5 import sample_dopri5
from sfd_fast.sampling.guidance import Guided, Velocity, check_scales
from sfd_fast.sampling.solvers import Callback, make_plan, time_grid
from sfd_fast.sampling.trajectory import Trajectory


def check_settings(sampler: SamplerConfig, guidance: GuidanceConfig, model: ModelConfig, delta_t: float) -> None:
    """Raises ValueError for settings under which a model cannot be sampled: too few steps, or guidance it lacks."""
    if sampler.solver != "dopri5":
        time_grid(sampler, delta_t)
    check_scales(guidance, delta_t)
    require_null_class(guidance, model)


def _sample_fixed(
    velocity: Velocity,
    x0: Tensor,
    delta_t: float,
    config: SamplerConfig,
    num_texture_channels: int,
    callback: Callback | None,
) -> Tensor:
    guided = isinstance(velocity, Guided)
    main, weak = (velocity.main, velocity.weak) if guided else (velocity, None)
    plan = make_plan(config, delta_t, velocity.config if guided else None)
    trajectory = Trajectory(plan, x0.shape, num_texture_channels=num_texture_channels, like=x0)
    trajectory.load(plan)
    trajectory.start(x0)
    times = [t.to(x0) for t in plan.clocks]

    def now(field: Velocity) -> Tensor:
        return field(trajectory.x, *(trajectory.now(t).expand(len(x0)) for t in times))

    return trajectory.run(
        lambda needs_weak: trajectory.step(partial(now, main), partial(now, weak) if needs_weak else None), callback
    )


def _sample_released_dopri5(
    velocity: Velocity, x0: Tensor, delta_t: float, config: SamplerConfig, num_texture_channels: int
) -> Tensor:
    """Dormand-Prince exactly as released: torchdiffeq over the whole interval, one error norm for the batch."""
    from torchdiffeq import odeint

    def drift(tau: Tensor, x: Tensor) -> Tensor:
        mask = evaluation_mask(tau, delta_t)
        field = velocity.needed(tau.cpu(), mask) if isinstance(velocity, Guided) else velocity
        velocities = field(x, *(t.to(x.dtype) for t in released_clocks(tau.expand(len(x)), delta_t)))
        return join_latents(
            *(part * moves for part, moves in zip(split_latents(velocities, num_texture_channels), mask))
        )

    grid = time_grid(config, delta_t).to(x0.device)
    return odeint(drift, x0, grid, method="dopri5", atol=config.atol, rtol=config.rtol)[-1]


@torch.no_grad()
def sample(
    velocity: Velocity,
    x0: Tensor,
    *,
    delta_t: float,
    config: SamplerConfig,
    num_texture_channels: int,
    callback: Callback | None = None,
) -> Tensor:
    """Integrate dx/dtau = mask * v(x, t_tex, t_sem) from noise at tau = 0 to data at tau = 1 + delta_t.

    velocity: a velocity function, plain or from guidance.cfg / guidance.autoguidance; x0: (B, C, H, W) noise, float32
    or float64. callback(number of steps done, tau, x) follows every step of a fixed-grid solver; it must not keep x
    itself, which the next step overwrites.
    Returns (B, C, H, W) of x0's dtype; x0 is left as it is.
    Raises ValueError for fewer steps than there are stages.  Source: SFD (arXiv 2512.04926), docs/METHOD.md 5.
    """
    if config.solver != "dopri5":
        return _sample_fixed(velocity, x0, delta_t, config, num_texture_channels, callback)
    if config.grid == "released":
        x = _sample_released_dopri5(velocity, x0, delta_t, config, num_texture_channels)
        changed = None if callback is None else callback(1, 1 + delta_t, x)
        return x if changed is None else changed.to(x)
    return sample_dopri5(velocity, x0, delta_t, config, num_texture_channels, callback)
