"""Grids, masks, solvers: golden states, exactness, orders of convergence, adaptive steps."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from support import GOLDEN, load_golden, load_golden_config

from sfd_fast import guidance
from sfd_fast.config import GuidanceConfig, SamplerConfig
from sfd_fast.sampler import MULTISTEPS, adams_weights, make_plan, sample, stage_borders, time_grid
from sfd_fast.transport import clocks, stage_mask

FIXED = ["euler", "midpoint", "heun", "ab2", "abm3", "rk4"]
DELTAS = [0.0, 0.1, 0.3, 0.5, 1.0]
ONES = lambda x, t_tex, t_sem: torch.ones_like(x)  # noqa: E731


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


@pytest.mark.golden
@pytest.mark.parametrize("name", ["sfd", "sync", "noshift", "patch2"])
def test_released_grid_equals_the_released_samplers(name):
    from sfd_fast.checkpoint import load_released

    config, tensors = load_golden_config(name), load_golden(f"{name}.golden")
    delta_t, split = config["semfirst_delta_t"], config["in_channels"] - config["semantic_chans"]
    model = load_released(GOLDEN / f"{name}.weights.safetensors", config).eval()
    small = config | {"depth": 2, "repa_depth": 1}
    guide = load_released(GOLDEN / f"{name}.guide.weights.safetensors", small).eval()
    common = {"num_texture_channels": split, "delta_t": delta_t}
    main = guidance.bind_labels(model, tensors["y"])
    null = guidance.bind_null(model, tensors["y"], config["num_classes"])
    weak = guidance.bind_labels(guide, tensors["y"])
    velocities = {
        "cfg": guidance.cfg(main, null, GuidanceConfig(mode="cfg", scale=2.5), **common),
        "autoguidance": guidance.autoguidance(main, weak, GuidanceConfig(mode="autoguidance", scale=1.5), **common),
    }
    compared = 0
    for key, expected in tensors.items():
        if not key.startswith("sample.") or key == "sample.z":
            continue
        fields = key.removeprefix("sample.").split("_")
        if fields[0] in velocities:
            velocity, solver, points, shift = velocities[fields[0]], "euler", 11, 1.0
        else:
            velocity, solver, points, shift = (
                main,
                fields[0].replace("heun2", "heun"),
                int(fields[1]),
                float(fields[2][5:]),
            )
        settings = SamplerConfig(solver=solver, num_steps=points - 1, grid="released", timestep_shift=shift or 1.0)
        out = sample(velocity, tensors["sample.z"], config=settings, **common)
        tolerance = 1e-3 if solver == "dopri5" else 1e-5
        torch.testing.assert_close(out, expected, rtol=max(1e-4, tolerance), atol=tolerance)
        compared += 1
    assert compared == 8


@pytest.mark.parametrize("shift", [1.0, 0.3, 3.0])
@pytest.mark.parametrize("delta_t", DELTAS)
def test_exact_grid_holds_the_borders(delta_t, shift):
    for num_steps in (3, 4, 5, 8, 10, 50, 250):
        grid = time_grid(SamplerConfig(num_steps=num_steps, timestep_shift=shift), delta_t)
        assert len(grid) == num_steps + 1
        assert set(stage_borders(delta_t)) <= set(grid.tolist())
        assert (grid.diff() > 0).all()


def test_every_stage_gets_its_share_of_the_steps():
    grid = time_grid(SamplerConfig(num_steps=26), 0.3)
    steps = [((grid > a - 1e-9) & (grid < b - 1e-9)).sum().item() for a, b in [(0, 0.3), (0.3, 1.0), (1.0, 1.3)]]
    assert steps == [6, 14, 6]
    torch.testing.assert_close(grid, torch.linspace(0, 1.3, 27, dtype=torch.float64))


def test_shift_moves_points_by_its_formula():
    grid = time_grid(SamplerConfig(num_steps=10, timestep_shift=0.3), 0.0)
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(grid.numpy(), 0.3 * u / (1 - 0.7 * u), rtol=1e-12)
    assert (time_grid(SamplerConfig(num_steps=20, timestep_shift=0.3), 0.3).diff()[:3] < 1.3 / 20).all()


def test_released_grid_is_even_and_misses_the_borders():
    grid = time_grid(SamplerConfig(num_steps=10, grid="released"), 0.3)
    torch.testing.assert_close(grid, torch.linspace(0, 1.3, 11))
    assert 0.3 not in grid.tolist()


def test_too_few_steps_for_the_stages_is_an_error():
    with pytest.raises(ValueError, match=r"num_steps 2 is too small.*3 stages.*num_steps >= 3"):
        time_grid(SamplerConfig(num_steps=2), 0.3)
    assert len(time_grid(SamplerConfig(num_steps=1), 0.0)) == 2
    assert len(time_grid(SamplerConfig(num_steps=2), 1.0)) == 3


@pytest.mark.parametrize("shift", [1.0, 0.3])
@pytest.mark.parametrize("delta_t", DELTAS)
@pytest.mark.parametrize("solver", FIXED)
def test_velocity_one_moves_each_stream_by_one_with_every_number_of_steps(solver, delta_t, shift):
    start = np.array([[0.0], [1.7]], dtype=np.float32)
    for num_steps in range(3, 251) if solver not in MULTISTEPS else [*range(3, 30), 50, 99, 100, 249, 250]:
        plan = make_plan(SamplerConfig(solver=solver, num_steps=num_steps, timestep_shift=shift), delta_t)
        exact = plan.coefficients.sum(2)[plan.commit == 1].sum(0)
        torch.testing.assert_close(exact, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
        rows = plan.float32_coefficients()[plan.commit == 1].permute(0, 2, 1).numpy().reshape(-1, 1, 2)
        rows = np.concatenate([np.broadcast_to(start, (1, 2, 2)), np.broadcast_to(rows, (len(rows), 2, 2))])
        states = np.add.accumulate(rows, axis=0)  # as a float32 state takes the terms up, one after the other
        assert states.dtype == np.float32
        assert np.abs(states[-1] - start - 1).max() < 1e-6


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
def test_velocity_one_moves_the_state_by_one(solver):
    x0 = torch.linspace(-4, 4, 32).view(4, 4, 2, 1)
    for num_steps, delta_t, shift in [(3, 0.3, 1.0), (10, 0.1, 0.3), (50, 0.5, 1.0), (250, 0.3, 1.0), (100, 0.0, 2.0)]:
        config = SamplerConfig(solver=solver, num_steps=num_steps, timestep_shift=shift)
        moved = sample(ONES, x0, delta_t=delta_t, config=config, num_texture_channels=3) - x0
        torch.testing.assert_close(moved, torch.ones_like(x0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("delta_t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("ab2", 2), ("abm3", 3), ("rk4", 4)]
)
def test_order_of_convergence_stage_by_stage(solver, order, delta_t):
    x0 = start_state()
    expected = tight_states(x0, delta_t)
    borders = stage_borders(delta_t)[1:]
    errors = []
    for num_steps in (104, 208):
        states = {}
        sample(
            curved,
            x0,
            delta_t=delta_t,
            config=SamplerConfig(solver=solver, num_steps=num_steps),
            num_texture_channels=1,
            callback=lambda step, tau, x, states=states: states.update({tau: x.clone()}),
        )
        errors.append(
            [(states[border] - exact).square().mean().sqrt().item() for border, exact in zip(borders, expected)]
        )
    for coarse, fine in zip(*errors):
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
def test_a_still_stream_never_sees_its_velocity(solver):
    """Texture's velocity is NaN before delta_t, that of semantics after 1: mask and history let neither through."""

    def velocity(x, t_tex, t_sem):
        out = torch.ones_like(x)
        out[:, :2][(t_tex == 0) & (t_sem < 0.29999)] = float("nan")
        out[:, 2:][t_tex > 0.70001] = float("nan")
        return out

    states = {}
    out = sample(
        velocity,
        torch.zeros(2, 3, 2, 2),
        delta_t=0.3,
        config=SamplerConfig(solver=solver, num_steps=26),
        num_texture_channels=2,
        callback=lambda step, tau, x: states.update({tau: x.clone()}),
    )
    torch.testing.assert_close(out, torch.ones(2, 3, 2, 2), rtol=0, atol=1e-5)
    assert torch.equal(states[0.3][:, :2], torch.zeros(2, 2, 2, 2))
    assert torch.equal(states[1.0][:, 2:], out[:, 2:])


def test_sampling_leaves_the_noise_as_it_is():
    x0 = start_state()
    kept = x0.clone()
    sample(curved, x0, delta_t=0.3, config=SamplerConfig(num_steps=5), num_texture_channels=1)
    assert torch.equal(x0, kept)


def test_num_steps_counts_steps_and_the_callback_follows_each():
    calls, taus = [0], []

    def counted(x, t_tex, t_sem):
        calls[0] += 1
        return curved(x, t_tex, t_sem)

    for solver, per_step in [("euler", 1), ("midpoint", 2), ("heun", 2), ("ab2", 1), ("abm3", 1), ("rk4", 4)]:
        calls[0] = 0
        taus.clear()
        config = SamplerConfig(solver=solver, num_steps=7)
        sample(
            counted, start_state(), delta_t=0.3, config=config, num_texture_channels=1,
            callback=lambda step, tau, x: taus.append((step, tau)),
        )  # fmt: skip
        assert calls[0] == 7 * per_step
        assert taus == list(enumerate(time_grid(config, 0.3).tolist()))[1:]


def test_guidance_is_evaluated_only_where_it_matters():
    calls = []

    def weak(x, t_tex, t_sem):
        calls.append((t_tex[0].item(), t_sem[0].item()))
        return torch.zeros_like(x)

    config = GuidanceConfig(mode="autoguidance", texture_scale=2.0, semantic_scale=1.0)
    velocity = guidance.autoguidance(ONES, weak, config, num_texture_channels=1, delta_t=0.3)
    settings = SamplerConfig(solver="euler", num_steps=13)
    moved = sample(velocity, start_state(dtype=torch.float32), delta_t=0.3, config=settings, num_texture_channels=1)
    moved = moved - start_state(dtype=torch.float32)
    assert len(calls) == 10  # not in the three steps in which semantics alone move
    torch.testing.assert_close(moved[:, 0], torch.full((3, 1, 1), 2.0), rtol=0, atol=2e-6)
    torch.testing.assert_close(moved[:, 1], torch.ones(3, 1, 1), rtol=0, atol=2e-6)
    calls.clear()
    interval = GuidanceConfig(mode="cfg", scale=2.0, interval_start=0.45)
    velocity = guidance.cfg(ONES, weak, interval, num_texture_channels=1, delta_t=0.3)
    sample(velocity, start_state(), delta_t=0.3, config=settings, num_texture_channels=1)
    assert min(t_sem for _, t_sem in calls) >= 0.45
    assert len(calls) == 8


def test_guided_sampling_equals_sampling_the_mixed_velocity():
    weak = lambda x, t_tex, t_sem: 0.5 * curved(x, t_tex, t_sem) + 0.1  # noqa: E731
    for settings in (
        GuidanceConfig(mode="cfg", scale=1.7),
        GuidanceConfig(mode="autoguidance", texture_scale=1.3, semantic_scale=1.8, interval_start=0.2),
    ):
        velocity = guidance.autoguidance(curved, weak, settings, num_texture_channels=1, delta_t=0.3)
        for solver in FIXED:
            config = SamplerConfig(solver=solver, num_steps=8)
            common = {"delta_t": 0.3, "config": config, "num_texture_channels": 1}
            fused = sample(velocity, start_state(), **common)
            mixed = sample(lambda x, a, b, velocity=velocity: velocity(x, a, b), start_state(), **common)
            torch.testing.assert_close(fused, mixed, rtol=0, atol=1e-12)


def test_adams_weights_equal_the_known_fractions():
    np.testing.assert_allclose(adams_weights([0.0, -1.0], 0.0, 1.0), [3 / 2, -1 / 2])
    np.testing.assert_allclose(adams_weights([0.0, -1.0, -2.0], 0.0, 1.0), [23 / 12, -16 / 12, 5 / 12])
    np.testing.assert_allclose(adams_weights([0.0, -1.0, -2.0, -3.0], 0.0, 1.0), np.array([55, -59, 37, -9]) / 24)
    uneven = adams_weights([0.4, 0.1], 0.4, 0.6)  # h (1 + h / (2 h_prev)), -h^2 / (2 h_prev)
    np.testing.assert_allclose(uneven, [0.2 * (1 + 0.2 / 0.6), -0.2 * 0.2 / 0.6])


@pytest.mark.parametrize("delta_t", DELTAS)
def test_dopri5_reaches_the_exact_states_stage_by_stage(delta_t):
    x0, states = start_state(), []
    sample(
        curved,
        x0,
        delta_t=delta_t,
        config=SamplerConfig(solver="dopri5", atol=1e-10, rtol=1e-10),
        num_texture_channels=1,
        callback=lambda stage, tau, x: states.append(x.clone()),
    )
    for state, exact in zip(states, tight_states(x0, delta_t), strict=True):
        torch.testing.assert_close(state, exact, rtol=0, atol=1e-8)


def test_dopri5_equals_torchdiffeq_sample_by_sample():
    from torchdiffeq import odeint

    x0 = start_state(batch=4)
    evaluations = []

    def counted(x, t_tex, t_sem):
        evaluations.append(len(x))
        return curved(x, t_tex, t_sem)

    config = SamplerConfig(solver="dopri5", atol=1e-5, rtol=1e-4)
    for i in range(4):
        x, before = x0[i : i + 1], len(evaluations)
        calls = 0
        for start, end in zip(stage_borders(0.3), stage_borders(0.3)[1:]):
            mask = torch.tensor(stage_mask(start, end, 0.3)).view(1, 2, 1, 1)

            def drift(tau, state, mask=mask):
                nonlocal calls
                calls += 1
                return curved(state, *clocks(tau.expand(1), 0.3)) * mask

            ends = torch.tensor([start, end], dtype=torch.float64)
            options = {"step_t": torch.tensor([end], dtype=torch.float64)}
            x = odeint(drift, x, ends, method="dopri5", atol=1e-5, rtol=1e-4, options=options)[-1]
        ours = sample(counted, x0[i : i + 1], delta_t=0.3, config=config, num_texture_channels=1)
        torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)
        assert len(evaluations) - before == calls  # the same steps, not just the same result
    together = sample(curved, x0, delta_t=0.3, config=config, num_texture_channels=1)
    torch.testing.assert_close(together[3:], x, rtol=0, atol=1e-12)


def test_dopri5_of_a_sample_does_not_depend_on_its_batch():
    config = SamplerConfig(solver="dopri5")
    x0 = start_state(batch=4, dtype=torch.float32)
    stiff = torch.cat([x0[:1], torch.full_like(x0[:1], 40.0)])
    common = {"delta_t": 0.3, "config": config, "num_texture_channels": 1}
    pair = sample(curved, torch.cat([x0[:1], x0[1:2]]), **common)
    assert torch.equal(pair[:1], sample(curved, stiff, **common)[:1])


def test_dopri5_with_a_velocity_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="velocity of sample 0 of the batch is not finite near tau 0"):
        sample(
            lambda x, t_tex, t_sem: x * float("nan"),
            start_state(),
            delta_t=0.3,
            config=SamplerConfig(solver="dopri5"),
            num_texture_channels=1,
        )


def test_dopri5_that_cannot_meet_its_tolerances_is_an_error(monkeypatch):
    monkeypatch.setattr("sfd_fast.adaptive.MAX_STEPS", 200)
    # A velocity whose sign flips a billion times: its steps stay tiny.
    rough = lambda x, t_tex, t_sem: torch.sign(torch.sin(1e9 * t_tex)).view(-1, 1, 1, 1) * 1e4 + x  # noqa: E731
    with pytest.raises(ValueError, match="cannot reach tau"):
        sample(
            rough,
            start_state(),
            delta_t=0.0,
            config=SamplerConfig(solver="dopri5", atol=1e-12, rtol=1e-12),
            num_texture_channels=1,
        )
