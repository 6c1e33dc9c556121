"""Time grids and plans: borders on the grid, exact displacements, Adams formulas."""

import numpy as np
import pytest
import torch

from sfd_fast.config import SamplerConfig
from sfd_fast.sampling.solvers import MULTISTEPS, adams_weights, make_plan, stage_borders, time_grid

FIXED = ["euler", "midpoint", "heun", "ab2", "abm3", "rk4"]
DELTAS = [0.0, 0.1, 0.3, 0.5, 1.0]


@pytest.mark.parametrize("shift", [1.0, 0.3, 3.0])
@pytest.mark.parametrize("delta_t", DELTAS)
def test_exact_grid_holds_the_borders(delta_t, shift):
    for num_steps in (3, 4, 5, 8, 10, 50, 250):
        grid = time_grid(SamplerConfig(num_inference_steps=num_steps, timestep_shift=shift), delta_t)
        assert len(grid) == num_steps + 1
        assert set(stage_borders(delta_t)) <= set(grid.tolist())
        assert (grid.diff() > 0).all()


def test_every_stage_gets_its_share_of_the_steps():
    grid = time_grid(SamplerConfig(num_inference_steps=26), 0.3)
    steps = [((grid > a - 1e-9) & (grid < b - 1e-9)).sum().item() for a, b in [(0, 0.3), (0.3, 1.0), (1.0, 1.3)]]
    assert steps == [6, 14, 6]
    torch.testing.assert_close(grid, torch.linspace(0, 1.3, 27, dtype=torch.float64))


def test_shift_moves_points_by_its_formula():
    grid = time_grid(SamplerConfig(num_inference_steps=10, timestep_shift=0.3), 0.0)
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(grid.numpy(), 0.3 * u / (1 - 0.7 * u), rtol=1e-12)
    assert (time_grid(SamplerConfig(num_inference_steps=20, timestep_shift=0.3), 0.3).diff()[:3] < 1.3 / 20).all()


def test_released_grid_is_even_and_misses_the_borders():
    grid = time_grid(SamplerConfig(num_inference_steps=10, grid="released"), 0.3)
    torch.testing.assert_close(grid, torch.linspace(0, 1.3, 11))
    assert 0.3 not in grid.tolist()


def test_too_few_steps_for_the_stages_is_an_error():
    with pytest.raises(ValueError, match=r"num_inference_steps 2 is too small.*3 stages.*num_inference_steps >= 3"):
        time_grid(SamplerConfig(num_inference_steps=2), 0.3)
    assert len(time_grid(SamplerConfig(num_inference_steps=1), 0.0)) == 2
    assert len(time_grid(SamplerConfig(num_inference_steps=2), 1.0)) == 3


@pytest.mark.parametrize("shift", [1.0, 0.3])
@pytest.mark.parametrize("delta_t", DELTAS)
@pytest.mark.parametrize("solver", FIXED)
def test_velocity_one_moves_each_stream_by_one_with_every_number_of_steps(solver, delta_t, shift):
    start = np.array([[0.0], [1.7]], dtype=np.float32)
    for num_steps in range(3, 251) if solver not in MULTISTEPS else [*range(3, 30), 50, 99, 100, 249, 250]:
        plan = make_plan(SamplerConfig(solver=solver, num_inference_steps=num_steps, timestep_shift=shift), delta_t)
        exact = plan.rows.coefficients.sum(2)[plan.rows.commit == 1].sum(0)
        torch.testing.assert_close(exact, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
        rows = plan.float32_coefficients()[plan.rows.commit == 1].permute(0, 2, 1).numpy().reshape(-1, 1, 2)
        rows = np.concatenate([np.broadcast_to(start, (1, 2, 2)), np.broadcast_to(rows, (len(rows), 2, 2))])
        states = np.add.accumulate(rows, axis=0)  # as a float32 state takes the terms up, one after the other
        assert states.dtype == np.float32
        assert np.abs(states[-1] - start - 1).max() < 1e-6


def test_adams_weights_equal_the_known_fractions():
    np.testing.assert_allclose(adams_weights([0.0, -1.0], 0.0, 1.0), [3 / 2, -1 / 2])
    np.testing.assert_allclose(adams_weights([0.0, -1.0, -2.0], 0.0, 1.0), [23 / 12, -16 / 12, 5 / 12])
    np.testing.assert_allclose(adams_weights([0.0, -1.0, -2.0, -3.0], 0.0, 1.0), np.array([55, -59, 37, -9]) / 24)
    uneven = adams_weights([0.4, 0.1], 0.4, 0.6)  # h (1 + h / (2 h_prev)), -h^2 / (2 h_prev)
    np.testing.assert_allclose(uneven, [0.2 * (1 + 0.2 / 0.6), -0.2 * 0.2 / 0.6])
