"""The capacity planner: parts against arithmetic, peaks against measured runs (two ranks: test_deepspeed.py)."""

from dataclasses import replace

import pytest
import torch
from deepspeed_ranks import FOOTPRINT_MODEL, peak_bytes, random_batch

from sfd_fast.config import OptimizerConfig, TrainConfig, TransportConfig
from sfd_fast.models.dit import LightningDiT
from sfd_fast.presets import XL, XXL, S
from sfd_fast.training.engine import TorchEngine
from sfd_fast.training.plan import (
    DEVICES,
    GIB,
    RESERVE_GIB,
    RESERVE_SHARE,
    PlanConfig,
    bound,
    count_parameters,
    format_plan,
    memory,
    micro_batches,
    plan,
)
from sfd_fast.transport import loss

TRANSPORT = TransportConfig()
SMALL = replace(S, depth=2)


def test_parameters_are_the_published_ones():
    """METHOD 3: 682.8M and 1037.2M with the REPA head and the frozen position embedding (256 tokens)."""
    assert round((count_parameters(XL)[0] + 256 * 1152) / 1e6, 1) == 682.8
    assert round((count_parameters(XXL)[0] + 256 * 1536) / 1e6, 1) == 1037.2


@pytest.mark.parametrize(
    ("precision", "micro_batch", "share"), [("fp32", 3, 0.0), ("fp32", 3, 0.5), ("parity", 4, 1.0)]
)
def test_one_process_uses_the_predicted_memory_within_a_tenth(precision, micro_batch, share):
    model = replace(FOOTPRINT_MODEL, depth=6)
    batch = random_batch(model, micro_batch)
    noise, tau = torch.randn_like(batch["latents"]), torch.full((micro_batch,), 0.5)

    def objective(network, batch):
        return loss(
            network, batch["latents"], noise, tau, batch["labels"], config=TRANSPORT,
            num_texture_channels=model.texture_channels, features=batch["features"],
        )  # fmt: skip

    def start():
        network = LightningDiT(model, checkpoint_activations=share)
        train = TrainConfig(precision=precision)
        optimizer = OptimizerConfig(max_grad_norm=1.0)
        engine = TorchEngine(network, objective, optimizer=optimizer, train=train, device=torch.device("cpu"))
        engine.train_step([batch], 1e-3)
        return engine

    measured, _ = peak_bytes(start, lambda engine: engine.train_step([batch], 1e-3))
    predicted = memory(
        model, TRANSPORT, world_size=1, zero_stage=0, micro_batch=micro_batch, checkpoint_activations=share,
        precision=precision,
    )  # fmt: skip
    assert predicted.peak == pytest.approx(measured, rel=0.1)


def test_state_follows_its_bytes_per_parameter():
    """ZeRO 2 on 8 ranks with fp32 weights: 4 whole, and an eighth of master 4, moments 8, average 4, gradient 4."""
    total = count_parameters(SMALL)[0]
    made = memory(SMALL, TRANSPORT, world_size=8, zero_stage=2, micro_batch=1)
    assert made.parameters == 4 * total
    assert (made.masters, made.moments, made.averages, made.gradients) == (total / 2, total, total / 2, total / 2)
    low = memory(SMALL, TRANSPORT, world_size=8, zero_stage=3, micro_batch=1, precision="bf16", moments="bf16")
    assert low.moments == pytest.approx(total / 2, rel=0.01)
    assert low.parameters == pytest.approx(total / 4, rel=0.02)


def test_micro_batches_divide_the_share():
    assert micro_batches(32) == [32, 16, 8, 4]
    assert micro_batches(12) == [12, 6, 3, 1]
    assert micro_batches(7) == [7, 1]


def test_offload_moves_state_to_the_host():
    plain = memory(SMALL, TRANSPORT, world_size=4, zero_stage=2, micro_batch=1)
    moved = memory(SMALL, TRANSPORT, world_size=4, zero_stage=2, micro_batch=1, offload_optimizer=True)
    assert moved.masters == moved.moments == moved.averages == 0
    assert moved.host == plain.masters + plain.moments + plain.averages + plain.gradients
    assert moved.peak < plain.peak


def test_recomputation_and_16_bit_weights_save_memory():
    def peak(**settings):
        return memory(SMALL, TRANSPORT, world_size=8, zero_stage=2, micro_batch=4, **settings).peak

    assert peak(checkpoint_activations=1.0) < peak(checkpoint_activations=0.5) < peak()
    assert peak(precision="bf16") < peak(precision="parity") < peak(precision="fp32")
    assert peak(residual="bf16", precision="bf16") < peak(precision="bf16")


def test_bounds_follow_operations_bytes_and_links():
    """XL: 724.0e9 operations an image (DESIGN); 2 w P (N - 1) / N bytes over the link."""
    device = DEVICES["h100-80g"]
    settings = {"per_rank": 32, "checkpoint_activations": 0.0, "precision": "parity"}
    made = bound(XL, device, world_size=8, zero_stage=1, **settings)
    assert made.products_s == pytest.approx(32 * 724.0e9 / 798e12, rel=1e-3)
    total = count_parameters(XL)[0]
    assert made.communication_s == pytest.approx(2 * 4 * total * 7 / 8 / 450e9)
    more = bound(XL, device, world_size=8, zero_stage=3, **settings)
    assert more.communication_s == pytest.approx(1.5 * made.communication_s)
    far = bound(XL, device, world_size=16, zero_stage=1, **settings)
    assert far.communication_s == pytest.approx(2 * 4 * total * 15 / 16 / 50e9)
    recomputed = bound(XL, device, world_size=8, zero_stage=1, **(settings | {"checkpoint_activations": 1.0}))
    assert recomputed.products_s == pytest.approx(32 * (724.0e9 + 237.3e9) / 798e12, rel=1e-3)


def test_up_to_4096_devices_on_paper():
    peaks = []
    for gpus in (8, 64, 512, 4096):
        made = plan(PlanConfig(model=replace(XXL, depth=3), gpus=gpus, global_batch_size=2 * gpus))
        stage3 = [o for o in made.options if o.zero_stage == 3 and o.checkpoint_activations == 0 and o.micro_batch == 2]
        peaks.append(stage3[0].memory.peak)
        assert made.best is not None and made.best.fits
    assert peaks == sorted(peaks, reverse=True)


def test_what_fits_is_named_and_what_does_not_says_what_helps():
    fitting = format_plan(plan(PlanConfig(model=SMALL, gpus=8, global_batch_size=16)))
    assert "fits best: ZeRO" in fitting and "--deepspeed.zero_stage" in fitting and "lower bounds" in fitting
    tight = plan(PlanConfig(model=SMALL, gpus=8, global_batch_size=16, memory_gib=2.2))
    assert tight.best is None
    assert "nothing fits: the least is" in format_plan(tight)
    assert all(o.memory.peak > tight.limit_gib * GIB for o in tight.options)


def test_the_best_option_fits_and_none_that_fits_is_faster():
    config = PlanConfig(model=SMALL, gpus=8, global_batch_size=16)
    peaks = sorted(o.memory.peak for o in plan(config).options)
    made = plan(replace(config, memory_gib=(peaks[len(peaks) // 2] / GIB + RESERVE_GIB) / (1 - RESERVE_SHARE)))
    fitting = [o for o in made.options if o.fits]
    assert 0 < len(fitting) < len(made.options)
    assert made.best in fitting
    assert made.best.bound.step_s == min(o.bound.step_s for o in fitting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": "h100"}, "gpu 'h100' is unknown; choose one of a100-40g"),
        ({"gpus": 0}, "gpus 0 must be at least 1"),
        ({"gpus": 7}, "global_batch_size 256 must be a multiple of the 7 gpus"),
    ],
)
def test_impossible_plans_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(model=S, **settings)
