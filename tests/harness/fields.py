"""A velocity field with known solutions, for tests of solvers."""

import torch
from scipy.integrate import solve_ivp

from sfd_fast.diffusion.transport import clocks, stage_mask
from sfd_fast.sampling.solvers import stage_borders


def curved(x, t_tex, t_sem):
    """A smooth nonlinear field in which both streams and both clocks act on each other; texture is channel 0."""
    texture, semantic = x[:, :1], x[:, 1:]
    a, b = t_tex.view(-1, 1, 1, 1), t_sem.view(-1, 1, 1, 1)
    return torch.cat(
        [torch.sin(3 * texture) + semantic * torch.cos(2 * a), torch.cos(2 * semantic) * (1 + b) - 0.5 * texture * b], 1
    )


def tight_states(x0, delta_t):
    """The exact states at every stage border, by scipy's DOP853 with tolerances of 1e-12."""
    states, x = [], x0.double()
    for start, end in zip(stage_borders(delta_t), stage_borders(delta_t)[1:]):
        mask = torch.tensor(stage_mask(start, end, delta_t), dtype=torch.float64).view(1, 2, 1, 1)

        def drift(tau, flat, mask=mask, shape=x.shape):
            state = torch.from_numpy(flat).view(shape)
            times = clocks(torch.full((len(state),), tau, dtype=torch.float64), delta_t)
            return (curved(state, *times) * mask).numpy().ravel()

        solution = solve_ivp(drift, (start, end), x.numpy().ravel(), "DOP853", rtol=1e-12, atol=1e-12)
        x = torch.from_numpy(solution.y[:, -1]).view(x.shape)
        states.append(x)
    return states


def start_state(batch=3, dtype=torch.float64):
    return torch.linspace(-1, 1, 2 * batch, dtype=dtype).view(batch, 2, 1, 1)
