"""The sampling loop: golden states, exactness, orders of convergence, masks, guidance."""

import numpy as np
import pytest
import torch
from harness.fields import curved, start_state, tight_states
from harness.support import GOLDEN, load_golden, load_golden_config

from sfd_fast.config import GuidanceConfig, SamplerConfig
from sfd_fast.sampling import guidance
from sfd_fast.sampling.sampler import sample
from sfd_fast.sampling.solvers import stage_borders, time_grid

FIXED = ["euler", "midpoint", "heun", "ab2", "abm3", "rk4"]
DOPRI5_TOLERANCE = {"sync": 1e-5, "sfd": 3e-4, "noshift": 3e-4, "patch2": 1e-3}
"""its steps cross the borders, where masks jump: noise changed by 1e-7 moves the result by up to 1.3e-4, 8e-5, 8e-4"""
ONES = lambda x, t_tex, t_sem: torch.ones_like(x)  # noqa: E731


@pytest.mark.golden
@pytest.mark.parametrize("name", ["sfd", "sync", "noshift", "patch2"])
def test_released_grid_equals_the_released_samplers(name):
    from sfd_fast.formats.released_model import load_released

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
        settings = SamplerConfig(
            solver=solver, num_inference_steps=points - 1, grid="released", timestep_shift=shift or 1.0
        )
        out = sample(velocity, tensors["sample.z"], config=settings, **common)
        tolerance = DOPRI5_TOLERANCE[name] if solver == "dopri5" else 1e-5
        torch.testing.assert_close(out, expected, rtol=max(1e-4, tolerance), atol=tolerance)
        compared += 1
    assert compared == 8


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
def test_velocity_one_moves_the_state_by_one(solver):
    x0 = torch.linspace(-4, 4, 32).view(4, 4, 2, 1)
    for num_steps, delta_t, shift in [(3, 0.3, 1.0), (10, 0.1, 0.3), (50, 0.5, 1.0), (250, 0.3, 1.0), (100, 0.0, 2.0)]:
        config = SamplerConfig(solver=solver, num_inference_steps=num_steps, timestep_shift=shift)
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
    for num_inference_steps in (104, 208):
        states = {}
        sample(
            curved,
            x0,
            delta_t=delta_t,
            config=SamplerConfig(solver=solver, num_inference_steps=num_inference_steps),
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
        config=SamplerConfig(solver=solver, num_inference_steps=26),
        num_texture_channels=2,
        callback=lambda step, tau, x: states.update({tau: x.clone()}),
    )
    torch.testing.assert_close(out, torch.ones(2, 3, 2, 2), rtol=0, atol=1e-5)
    assert torch.equal(states[0.3][:, :2], torch.zeros(2, 2, 2, 2))
    assert torch.equal(states[1.0][:, 2:], out[:, 2:])


def test_sampling_leaves_the_noise_as_it_is():
    x0 = start_state()
    kept = x0.clone()
    sample(curved, x0, delta_t=0.3, config=SamplerConfig(num_inference_steps=5), num_texture_channels=1)
    assert torch.equal(x0, kept)


def test_num_steps_counts_steps_and_the_callback_follows_each():
    calls, taus = [0], []

    def counted(x, t_tex, t_sem):
        calls[0] += 1
        return curved(x, t_tex, t_sem)

    for solver, per_step in [("euler", 1), ("midpoint", 2), ("heun", 2), ("ab2", 1), ("abm3", 1), ("rk4", 4)]:
        calls[0] = 0
        taus.clear()
        config = SamplerConfig(solver=solver, num_inference_steps=7)
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
    settings = SamplerConfig(solver="euler", num_inference_steps=13)
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
            config = SamplerConfig(solver=solver, num_inference_steps=8)
            common = {"delta_t": 0.3, "config": config, "num_texture_channels": 1}
            fused = sample(velocity, start_state(), **common)
            mixed = sample(lambda x, a, b, velocity=velocity: velocity(x, a, b), start_state(), **common)
            torch.testing.assert_close(fused, mixed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", FIXED)
def test_a_nan_guide_does_not_touch_the_stream_that_is_not_guided(solver):
    """Texture has weight 1: whatever the guide says of it, it moves as without a guide, to the bit."""

    def weak(x, t_tex, t_sem):
        out = torch.zeros_like(x)
        out[:, :1] = float("nan")
        return out

    alone = lambda x, t_tex, t_sem: torch.cos(3 * x) + t_sem.view(-1, 1, 1, 1)  # noqa: E731  streams act on themselves
    config = GuidanceConfig(mode="autoguidance", texture_scale=1.0, semantic_scale=1.8)
    common = {"delta_t": 0.3, "num_texture_channels": 1}
    velocity = guidance.autoguidance(alone, weak, config, **common)
    x0, settings = start_state(dtype=torch.float32), SamplerConfig(solver=solver, num_inference_steps=7)
    guided = sample(velocity, x0, config=settings, **common)
    plain = sample(alone, x0, config=settings, **common)
    assert torch.equal(guided[:, :1], plain[:, :1])
    assert guided[:, 1:].isfinite().all()
    assert not torch.equal(guided[:, 1:], plain[:, 1:])
