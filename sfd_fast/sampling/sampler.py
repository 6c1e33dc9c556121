"""The sampling ODE over tau in [0, 1 + delta_t]: one loop over a solver's plan, and dopri5.

Letters: B batch, C channels, H height, W width, E evaluations.
"""

import torch
from sfd_kernels import masked_velocity_update
from torch import Tensor

from sfd_fast.config import GuidanceConfig, SamplerConfig
from sfd_fast.diffusion.transport import clocks, evaluation_mask, join_latents, split_latents
from sfd_fast.sampling.dopri5 import sample_dopri5
from sfd_fast.sampling.guidance import Guided, Velocity, stream_weights
from sfd_fast.sampling.solvers import Callback, Plan, check_solver, make_plan, time_grid


def guidance_table(plan: Plan, guidance: GuidanceConfig | None, delta_t: float) -> tuple[Tensor, list[bool]]:
    """Weights of every evaluation, and whether the weak velocity is needed there at all.

    A stream that does not move needs no guidance, and where no moving stream has a weight other than 1 the weak
    evaluation is left out.  Returns (E, 2) float64 and E booleans.
    """
    weights = torch.ones(plan.num_evaluations, 2, dtype=torch.float64)
    if guidance is not None and guidance.active:
        weights = torch.stack(stream_weights(*clocks(plan.tau, delta_t), guidance, delta_t), dim=1)
        weights = torch.where(plan.moves, weights, 1.0)
    return weights, (weights != 1).any(dim=1).tolist()


def _sample_fixed(
    velocity: Velocity, x0: Tensor, delta_t: float, config: SamplerConfig, num_texture_channels: int, callback: Callback
) -> Tensor:
    plan = make_plan(config, delta_t)
    guided = isinstance(velocity, Guided)
    main, weak = (velocity.main, velocity.weak) if guided else (velocity, None)
    weights, needs_weak = guidance_table(plan, velocity.config if guided else None, delta_t)
    x = x0.clone()
    base = x0.clone() if plan.has_base else None
    history = x0.new_zeros(plan.num_history, *x0.shape) if plan.num_history else None
    as_state = {"device": x.device, "dtype": x.dtype}
    exact = x.dtype == torch.float64 or config.grid == "released"
    coefficients = (plan.coefficients if exact else plan.float32_coefficients()).to(**as_state)
    weights = weights.to(**as_state)
    slots, commits = plan.write_slot.to(x.device)[:, None], plan.commit.to(x.device)[:, None]
    t_tex, t_sem = (t.to(**as_state) for t in clocks(plan.tau, delta_t))
    ends = plan.commit.tolist()
    grid = time_grid(config, delta_t).tolist()
    done = 0
    for e in range(plan.num_evaluations):
        times = t_tex[e].expand(len(x)), t_sem[e].expand(len(x))
        masked_velocity_update(
            x,
            base,
            history,
            main(x, *times),
            weak(x, *times) if needs_weak[e] else None,
            weights[e] if needs_weak[e] else None,
            coefficients[e],
            slots[e] if plan.num_history else None,
            commits[e] if plan.has_base else None,
            num_texture_channels,
        )
        if ends[e]:
            done += 1
            callback(done, grid[done], x)
    return x


def _sample_released_dopri5(
    velocity: Velocity, x0: Tensor, delta_t: float, config: SamplerConfig, num_texture_channels: int
) -> Tensor:
    """Dormand-Prince exactly as released: torchdiffeq over the whole interval, one error norm for the batch."""
    from torchdiffeq import odeint

    def drift(tau: Tensor, x: Tensor) -> Tensor:
        mask = evaluation_mask(tau, delta_t)
        field = velocity.needed(tau.cpu(), mask) if isinstance(velocity, Guided) else velocity
        velocities = field(x, *(t.to(x.dtype) for t in clocks(tau.expand(len(x)), delta_t)))
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
    Raises ValueError as check_solver does.  Source: SFD (arXiv 2512.04926), docs/METHOD.md 5.
    """
    check_solver(config, delta_t)
    callback = callback or (lambda step, tau, x: None)
    if config.solver != "dopri5":
        return _sample_fixed(velocity, x0, delta_t, config, num_texture_channels, callback)
    if config.grid == "released":
        return _sample_released_dopri5(velocity, x0, delta_t, config, num_texture_channels)
    return sample_dopri5(velocity, x0, delta_t, config, num_texture_channels, callback)
