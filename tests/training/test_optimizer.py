"""AdamW with the averages in its state: against torch.optim.AdamW and closed forms."""

import copy
import math

import pytest
import torch
from torch import nn

from sfd_fast.config import OptimizerConfig
from sfd_fast.training.optimizer import AdamWEMA, WithEMA, build_optimizer, learning_rate, norm_of
from sfd_fast.training.state import StateReader, restore, snapshot_pieces, state_file, whole_piece, write_pieces

SHAPES = [(7, 5), (13,), (), (3, 2, 4)]


def parameters(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)) for s in SHAPES]


def gradients(step, params):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param)


def expected(num_steps, decay, lr=1e-2, weight_decay=0.1, scale=1.0):
    """torch.optim.AdamW in float64, then the average by its definition."""
    params = parameters(torch.float64)
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    emas = [p.detach().clone() for p in params]
    for step in range(num_steps):
        gradients(step, params)
        for param in params:
            param.grad *= scale
        optimizer.step()
        d = decay(step)
        emas = [d * e + (1 - d) * p.detach() for e, p in zip(emas, params)]
    return params, emas, optimizer


def close(actual, wanted, tolerance=2e-6):
    for a, w in zip(actual, wanted):
        torch.testing.assert_close(a.detach().double().cpu(), w.detach().double(), rtol=tolerance, atol=tolerance)


def ours(params, **settings):
    return AdamWEMA(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **settings)


def run(optimizer, params, steps):
    for step in steps:
        gradients(step, params)
        optimizer.step()


def test_trajectory_equals_torch_adamw_followed_by_an_ema():
    params = parameters()
    optimizer = ours(params, ema_decay=0.9)
    run(optimizer, params, range(20))
    wanted, emas, reference = expected(20, lambda n: 0.9)
    close(params, wanted)
    close([optimizer.state[p]["ema"] for p in params], emas)
    close([optimizer.state[p]["exp_avg"] for p in params], [reference.state[p]["exp_avg"] for p in wanted])
    close([optimizer.state[p]["exp_avg_sq"] for p in params], [reference.state[p]["exp_avg_sq"] for p in wanted])


def test_ema_warmup_follows_its_formula():
    params = parameters()
    optimizer = ours(params, ema_decay=0.5, ema_warmup=True)
    run(optimizer, params, range(12))
    _, emas, _ = expected(12, lambda n: min(0.5, (1 + n) / (10 + n)))
    close([optimizer.state[p]["ema"] for p in params], emas)


def test_several_averages_each_follow_their_own_decay():
    params = parameters()
    optimizer = ours(params, ema_decay=0.9, extra_ema_decays=(0.5, 0.99))
    run(optimizer, params, range(10))
    for name, decay in (("ema", 0.9), ("ema_1", 0.5), ("ema_2", 0.99)):
        _, emas, _ = expected(10, lambda n, d=decay: d)
        close([optimizer.state[p][name] for p in params], emas)


@pytest.mark.parametrize("name", ["adamw_ema", "torch_fused"])
def test_gradients_are_multiplied_by_grad_scale(name):
    params = parameters()
    config = OptimizerConfig(lr=1e-2, beta2=0.95, weight_decay=0.1, ema_decay=0.9, name=name)
    optimizer = build_optimizer(params, config)
    optimizer.grad_scale.fill_(0.25)
    run(optimizer, params, range(8))
    wanted, emas, _ = expected(8, lambda n: 0.9, scale=0.25)
    close(params, wanted)
    close([optimizer.state[p]["ema"] for p in params], emas)


@pytest.mark.parametrize("name", ["adamw_ema", "torch_fused"])
def test_skip_leaves_everything_untouched_even_with_nan_gradients(name):
    params = parameters()
    config = OptimizerConfig(lr=1e-2, beta2=0.95, weight_decay=0.1, ema_decay=0.9, extra_ema_decays=(0.5,), name=name)
    optimizer = build_optimizer(params, config)
    run(optimizer, params, range(3))
    before = copy.deepcopy([(p.detach(), dict(optimizer.state[p])) for p in params])
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    optimizer.skip.fill_(1)
    optimizer.step()
    for param, (value, state) in zip(params, before):
        assert torch.equal(param, value)
        for key, was in state.items():
            assert torch.equal(torch.as_tensor(optimizer.state[param][key]), torch.as_tensor(was)), key
    optimizer.skip.zero_()
    run(optimizer, params, range(3, 6))
    wanted, emas, _ = expected(6, lambda n: 0.9)
    close(params, wanted)
    close([optimizer.state[p]["ema"] for p in params], emas)


def test_torch_fused_adamw_with_an_ema_pass_equals_the_definition():
    params = parameters()
    config = OptimizerConfig(
        lr=1e-2, beta2=0.95, weight_decay=0.1, ema_decay=0.8, ema_warmup=True, name="torch_fused"
    )
    optimizer = build_optimizer(params, config)
    assert isinstance(optimizer, WithEMA)
    run(optimizer, params, range(10))
    wanted, emas, _ = expected(10, lambda n: min(0.8, (1 + n) / (10 + n)))
    close(params, wanted)
    close([optimizer.state[p]["ema"] for p in params], emas)


@pytest.mark.parametrize("moment_dtype", [None, torch.bfloat16])
def test_state_continues_to_the_same_bits_from_a_file(tmp_path, moment_dtype):
    params, copies = parameters(), parameters()
    settings = {"ema_decay": 0.9, "extra_ema_decays": (0.5,), "moment_dtype": moment_dtype}
    optimizer, restored = (ours(p, **settings) for p in (params, copies))
    run(optimizer, params, range(5))
    pieces = [whole_piece(str(i), param, optimizer.state[param]) for i, param in enumerate(params)]
    write_pieces(tmp_path / state_file(0), snapshot_pieces(pieces))
    with StateReader(tmp_path) as reader:
        for i, param in enumerate(copies):
            restore(reader, restored, str(i), param, 0, 0, param.numel())
    restored.share_steps()
    run(optimizer, params, range(5, 9))
    run(restored, copies, range(5, 9))
    for a, b in zip(params, copies):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, restored.state[b][key]) and value.dtype == restored.state[b][key].dtype, key


def test_a_parameter_without_gradient_keeps_its_own_step_number():
    params = parameters()
    optimizer = ours(params, ema_decay=0.9)
    wanted = parameters(torch.float64)
    reference = torch.optim.AdamW(wanted, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(6):
        for group, stepper in ((params, optimizer), (wanted, reference)):
            gradients(step, group)
            if step in (0, 3):
                group[1].grad = None
            stepper.step()
    close(params, wanted)
    assert float(optimizer.state[params[0]]["step"]) == 6
    assert float(optimizer.state[params[1]]["step"]) == 4


def test_before_step_may_set_the_scalars():
    params = parameters()
    optimizer = ours(params, ema_decay=0.9)
    optimizer.before_step = lambda: optimizer.grad_scale.fill_(0.5)
    run(optimizer, params, range(4))
    close(params, expected(4, lambda n: 0.9, scale=0.5)[0])


@pytest.mark.parametrize("name", ["deepspeed", "apex"])
def test_a_fused_adam_that_cannot_run_here_says_why(name):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: the error is about its absence")
    with pytest.raises(ValueError, match=f"'{name}'.*CUDA only.*adamw_ema or torch_fused"):
        build_optimizer(parameters(), OptimizerConfig(name=name))


def test_schedule_warms_up_and_decays_by_its_formula():
    config = OptimizerConfig(lr=2.0, warmup_steps=4, schedule="cosine", decay_start=10, final_lr_ratio=0.1)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:11] == [2.0] * 7
    assert math.isclose(rates[15], 2.0 * (0.1 + 0.9 * 0.5))
    assert math.isclose(learning_rate(config, 20, 20), 0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.gpu
def test_trajectory_on_cuda_equals_the_definition():
    params = parameters(device="cuda")
    optimizer = ours(params, ema_decay=0.9)
    run(optimizer, params, range(20))
    wanted, emas, _ = expected(20, lambda n: 0.9)
    close(params, wanted, 1e-5)
    close([optimizer.state[p]["ema"] for p in params], emas, 1e-5)


@pytest.mark.gpu
def test_a_step_on_cuda_never_reads_from_the_device():
    params = parameters(device="cuda")
    optimizer = ours(params, ema_decay=0.9, extra_ema_decays=(0.5,), ema_warmup=True)
    run(optimizer, params, range(2))
    gradients(2, params)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deepspeed", "apex"])
def test_another_librarys_fused_adam_follows_the_same_trajectory(name):
    params = parameters(device="cuda")
    try:
        optimizer = build_optimizer(
            params, OptimizerConfig(lr=1e-2, beta2=0.95, weight_decay=0.1, ema_decay=0.9, name=name)
        )
    except ValueError as error:
        pytest.skip(str(error))
    run(optimizer, params, range(10))
    wanted, emas, _ = expected(10, lambda n: 0.9)
    close(params, wanted, 1e-5)
    close([optimizer.state[p]["ema"] for p in params], emas, 1e-5)


def test_the_released_semvae_schedule_is_torchs():
    """docs/METHOD.md 2: LinearLR from 1 %, a constant rate, CosineAnnealingLR to 10 %, one after the other."""
    from torch.optim import lr_scheduler

    config = OptimizerConfig(
        lr=2.0, warmup_steps=5, warmup_start=0.01, schedule="cosine", decay_start=12, final_lr_ratio=0.1
    )
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    parts = [
        lr_scheduler.LinearLR(theirs, start_factor=0.01, total_iters=5),
        lr_scheduler.ConstantLR(theirs, factor=1.0, total_iters=7),
        lr_scheduler.CosineAnnealingLR(theirs, T_max=8, eta_min=0.2),
    ]
    schedule = lr_scheduler.SequentialLR(theirs, parts, milestones=[5, 12])
    for step in range(20):
        assert math.isclose(learning_rate(config, step, 20), theirs.param_groups[0]["lr"], rel_tol=1e-6), step
        theirs.step()
        schedule.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_gradients_is_added_up_in_fp32(dtype):
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 1000, 70_001)]
    grads.append(torch.randn(33, 7))
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    found = norm_of(grads)
    assert found.dtype == torch.float32 and found.dim() == 0
    assert float(found) == pytest.approx(float(exact), rel=1e-6)
    assert norm_of([grads[0], torch.tensor([torch.inf])]).isinf() and norm_of([torch.tensor([torch.nan])]).isnan()
