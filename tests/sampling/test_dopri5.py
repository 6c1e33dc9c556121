"""dopri5 per sample: exact states, torchdiffeq's own steps, independence of the batch, errors."""

import pytest
import torch
from harness.fields import curved, start_state, tight_states

from sfd_fast.config import GuidanceConfig, SamplerConfig
from sfd_fast.diffusion.transport import clocks, stage_mask
from sfd_fast.sampling import guidance
from sfd_fast.sampling.sampler import sample
from sfd_fast.sampling.solvers import stage_borders

DELTAS = [0.0, 0.1, 0.3, 0.5, 1.0]


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
    monkeypatch.setattr("sfd_fast.sampling.dopri5.MAX_STEPS", 200)
    # A velocity whose sign flips a billion times: its steps stay tiny.
    rough = lambda x, t_tex, t_sem: torch.sign(torch.sin(1e9 * t_tex)).view(-1, 1, 1, 1) * 1e4 + x  # noqa: E731
    with pytest.raises(ValueError, match=r"cannot reach tau 1.0 .*: 200 steps were not enough \(smallest step now 1"):
        sample(
            rough,
            start_state(),
            delta_t=0.0,
            config=SamplerConfig(solver="dopri5", atol=1e-12, rtol=1e-12),
            num_texture_channels=1,
        )


def test_dopri5_across_a_jump_says_that_its_step_has_shrunk():
    """No step that crosses it meets the tolerance, so steps halve until tau no longer moves."""
    jump = lambda x, t_tex, t_sem: torch.where(t_tex > 0.5, 1e18, 0.0).view(-1, 1, 1, 1).expand_as(x)  # noqa: E731
    with pytest.raises(ValueError, match=r"the step has shrunk to nothing \(smallest step now .*e-1\d\)"):
        sample(
            jump, start_state(), delta_t=0.0, num_texture_channels=1,
            config=SamplerConfig(solver="dopri5", atol=1e-12, rtol=1e-12),
        )  # fmt: skip


def guided_evaluations(grid, **settings):
    """Times (t_tex, t_sem) of dopri5's evaluations of the main and of the weak velocity; leaving some out changes no
    bit."""
    times = {"main": [], "weak": []}

    def recorded(name, field):
        def velocity(x, t_tex, t_sem):
            times[name].append((t_tex.min().item(), t_sem.min().item()))
            return field(x, t_tex, t_sem)

        return velocity

    weak = lambda x, t_tex, t_sem: 0.5 * curved(x, t_tex, t_sem) + 0.1  # noqa: E731
    config = GuidanceConfig(mode="autoguidance", **settings)
    common = {"num_texture_channels": 1, "delta_t": 0.3}
    solver = {"config": SamplerConfig(solver="dopri5", grid=grid)}
    x0 = start_state(batch=1, dtype=torch.float32)
    velocity = guidance.autoguidance(recorded("main", curved), recorded("weak", weak), config, **common)
    out = sample(velocity, x0, **solver, **common)
    both = guidance.autoguidance(curved, weak, config, **common)
    assert torch.equal(out, sample(lambda x, t_tex, t_sem: both(x, t_tex, t_sem), x0, **solver, **common))
    return times["main"], times["weak"]


@pytest.mark.parametrize("grid", ["exact", "released"])
def test_dopri5_leaves_the_weak_velocity_out_where_only_an_unguided_stream_moves(grid):
    main, weak = guided_evaluations(grid, texture_scale=1.5, semantic_scale=1.0)
    assert min(t_sem for _, t_sem in main) == 0
    assert min(t_sem for _, t_sem in weak) >= 0.2999999  # not in stage I
    main, weak = guided_evaluations(grid, texture_scale=1.0, semantic_scale=1.5)
    assert max(t_tex for t_tex, _ in main) > 0.99
    assert max(t_tex for t_tex, _ in weak) <= 0.7000001  # not in stage III


def test_dopri5_keeps_the_weak_velocity_in_the_whole_stage_inside_which_the_interval_starts():
    main, weak = guided_evaluations("exact", scale=1.5, interval_start=0.5)
    assert min(t_sem for _, t_sem in main) == 0
    assert min(t_sem for _, t_sem in weak) == pytest.approx(0.3)


def test_dopri5_on_the_released_grid_evaluates_past_the_end_with_an_unclamped_texture_clock():
    """Written from docs/METHOD.md 5 on torchdiffeq; clamping the clock would move the result by over 1e-4."""
    from torchdiffeq import odeint

    x0, latest = start_state(), []
    end = torch.linspace(0, 1.25, 5)

    def drift(tau, x, most=None):
        t_tex, t_sem = (tau - 0.25).clamp(0, most).expand(len(x)), tau.clamp(max=1).expand(len(x))
        latest.append(t_tex[0].item())
        return curved(x, t_tex, t_sem) * torch.stack([tau >= 0.25, tau <= 1]).view(1, 2, 1, 1)

    options = {"method": "dopri5", "atol": 1e-6, "rtol": 1e-3}
    expected = odeint(drift, x0, end, **options)[-1]
    assert max(latest) > 1.05
    config = SamplerConfig(solver="dopri5", num_inference_steps=4, grid="released")
    ours = sample(curved, x0, delta_t=0.25, config=config, num_texture_channels=1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    clamped = odeint(lambda tau, x: drift(tau, x, 1.0), x0, end, **options)[-1]
    assert (clamped - expected).abs().max() > 1e-4
