"""The capacity planner: parts against arithmetic, peaks against measured runs (two ranks: test_deepspeed.py)."""

import shlex
import time
from dataclasses import replace
from typing import get_args

import pytest
import torch
from harness.deepspeed_ranks import FOOTPRINT_MODEL, peak_bytes, random_batch

from sfd_fast import cli
from sfd_fast.config import OptimizerConfig, TrainConfig, TransportConfig
from sfd_fast.config.checks import annotations
from sfd_fast.config.planning import PlanConfig
from sfd_fast.config.presets import XL, XXL, S
from sfd_fast.diffusion.transport import loss
from sfd_fast.models.dit import LightningDiT
from sfd_fast.planning import footprint
from sfd_fast.planning.memory import GIB, count_parameters, memory
from sfd_fast.planning.plan import RESERVE_GIB, RESERVE_SHARE, micro_batches, plan
from sfd_fast.planning.table import format_plan, shown, train_flags
from sfd_fast.planning.time_bound import DEVICES, bound
from sfd_fast.training.engines.deepspeed_json import generate
from sfd_fast.training.engines.torch import TorchEngine

TRANSPORT = TransportConfig()
SMALL = replace(S, depth=2)


def test_parameters_are_the_published_ones():
    """docs/METHOD.md 3: 682.8M and 1037.2M with the REPA head and the frozen position embedding (256 tokens)."""
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


def test_accumulated_gradients_stay_beside_the_activations():
    """ZeRO 2 on 2 ranks, fp32: the partition, half of 4 bytes a parameter, is there through every forward pass."""
    total = count_parameters(SMALL)[0]
    settings = {"world_size": 2, "zero_stage": 2, "micro_batch": 16, "precision": "fp32"}
    once, summed = (memory(SMALL, TRANSPORT, accumulate=sums, **settings) for sums in (False, True))
    assert once.activations > once.gradients + once.step
    assert summed.peak - once.peak == pytest.approx(2 * total)


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
    """XL: 724.0e9 operations an image, 237.3e9 forward; 2 w P (N - 1) / N bytes over the link of one node."""
    device = DEVICES["h100-80g"]
    settings = {"per_rank": 32, "checkpoint_activations": 0.0, "precision": "parity"}
    made = bound(XL, device, world_size=8, zero_stage=1, **settings)
    assert made.products_s == pytest.approx(32 * 724.0e9 / 798e12, rel=1e-3)
    total = count_parameters(XL)[0]
    assert made.communication_s == pytest.approx(2 * 4 * total * 7 / 8 / 450e9)
    more = bound(XL, device, world_size=8, zero_stage=3, **settings)
    assert more.communication_s == pytest.approx(1.5 * made.communication_s)
    recomputed = bound(XL, device, world_size=8, zero_stage=1, **(settings | {"checkpoint_activations": 1.0}))
    assert recomputed.products_s == pytest.approx(32 * (724.0e9 + 237.3e9) / 798e12, rel=1e-3)
    assert bound(XL, device, world_size=1, zero_stage=1, **settings).communication_s == 0


@pytest.mark.parametrize(("zero_stage", "crossings"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_links_between_nodes_bound_by_all_cards_of_a_node_together(zero_stage, crossings):
    """XL in fp32, 4 x 682.5M = 2.730 GB, on 64 ranks in 8 nodes. Reduce-scatter: a node keeps an eighth of what it has
    summed and sends 7/8 of 2.730 GB = 2.389 GB to the others, over 8 cards of 2 GB/s: 149.3 ms. All-gather: it sends
    its eighth to each of 7 others, or others pass it on: again 2.389 GB enter every node. In the node each rank sends
    7/8 of 2.730 GB over 450 GB/s, 5.3 ms, meanwhile.
    """
    slow = replace(DEVICES["h100-80g"], network_link=2e9)
    settings = {"per_rank": 4, "checkpoint_activations": 0.0, "precision": "parity"}
    made = bound(XL, slow, world_size=64, zero_stage=zero_stage, **settings)
    assert made.communication_s == pytest.approx(crossings * 0.1493, rel=1e-3)
    fast = replace(slow, network_link=1e12)
    made = bound(XL, fast, world_size=64, zero_stage=zero_stage, **settings)
    assert made.communication_s == pytest.approx(crossings * 0.00531, rel=2e-3)


def test_repeated_operators_take_as_many_bytes_as_the_first(monkeypatch):
    """Shapes of the library's operators are kept from block to block: the count stays that of every call run."""
    settings = {"micro_batch": 3, "checkpoint_activations": 0.5, "precision": "parity", "keep_gradients": True}
    model = replace(SMALL, depth=4)
    quick = footprint.step_bytes(model, TRANSPORT, **settings)
    monkeypatch.setattr(footprint.LiveBytes, "repeated", lambda self, function, args: function(*args))
    assert quick == footprint.step_bytes(model, TRANSPORT, **settings)


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
    peaks = sorted(o.memory.peak for o in plan(replace(config, memory_gib=0.001)).options)
    made = plan(replace(config, memory_gib=(peaks[len(peaks) // 2] / GIB + RESERVE_GIB) / (1 - RESERVE_SHARE)))
    fitting = [o for o in made.options if o.fits]
    assert 0 < len(fitting) < len(made.options)
    assert made.best in fitting
    assert made.best.bound.step_s == min(o.bound.step_s for o in fitting)


def test_a_smaller_micro_batch_is_tried_only_where_the_larger_does_not_fit():
    """Memory between the peaks of one and thirteen samples without recomputation."""
    config = PlanConfig(model=SMALL, gpus=1, global_batch_size=13)
    every = [o for o in plan(replace(config, memory_gib=0.001)).options if o.zero_stage == 2]
    assert [(o.micro_batch, o.checkpoint_activations) for o in every] == [
        (13, 0.0), (1, 0.0), (13, 0.5), (1, 0.5), (13, 1.0), (1, 1.0)
    ]  # fmt: skip
    limit = (every[0].memory.peak + every[1].memory.peak) / 2
    made = plan(replace(config, memory_gib=(limit / GIB + RESERVE_GIB) / (1 - RESERVE_SHARE)))
    tried = [(o.micro_batch, o.checkpoint_activations, o.fits) for o in made.options if o.zero_stage == 2]
    assert tried[:2] == [(13, 0.0, False), (1, 0.0, True)]
    assert all(micro_batch > 1 for micro_batch, share, _ in tried if share > 0)


def test_what_training_refuses_is_left_out_with_its_reason():
    """bf16 under ZeRO 1 cannot accumulate, under ZeRO 0 it has no masters: see deepspeed_json.generate."""
    config = PlanConfig(model=SMALL, gpus=2, global_batch_size=16, precision="bf16", memory_gib=0.001)
    made = plan(config)
    assert {(o.zero_stage, o.micro_batch) for o in made.options if o.zero_stage < 2} == {(1, 8)}
    assert {o.micro_batch for o in made.options if o.zero_stage == 2} == {8, 4, 2, 1}
    text = format_plan(made)
    assert "left out: ZeRO 0 with micro-batch 8, 4, 2, 1: train.precision 'bf16' keeps fp32 masters" in text
    assert "left out: ZeRO 1 with micro-batch 4, 2, 1: train.precision 'bf16' with 2 accumulated" in text


@pytest.mark.parametrize(
    "config",
    [
        PlanConfig(model=SMALL, gpus=2, global_batch_size=16, precision="bf16", residual="bf16", moments="bf16"),
        PlanConfig(model=S, gpus=16, global_batch_size=32, extra_ema_decays=(0.9, 0.999), memory_gib=4.0),
        PlanConfig(model=SMALL, transport=TransportConfig(repa_weight=0.5), gpus=1, global_batch_size=4),
    ],
)
def test_the_printed_command_trains_what_was_planned(config):
    made = plan(config)
    line = next(line for line in format_plan(made).splitlines() if " train --" in line)
    trained = cli.parse("train", shlex.split(line)[shlex.split(line).index("train") + 1 :])
    assert (trained.model, trained.transport) == (config.model, config.transport)
    assert (trained.train.global_batch_size, trained.train.precision) == (config.global_batch_size, config.precision)
    assert (trained.train.residual, trained.optimizer.moments) == (config.residual, config.moments)
    assert trained.optimizer.extra_ema_decays == config.extra_ema_decays
    assert trained.train.micro_batch_size == made.best.micro_batch and trained.train.engine == "deepspeed"
    assert trained.train.checkpoint_activations == made.best.checkpoint_activations
    assert trained.deepspeed.zero_stage == made.best.zero_stage
    generate(trained.train, trained.optimizer, trained.deepspeed, world_size=config.gpus, device="cuda")


def test_every_option_that_is_shown_would_be_trained():
    made = plan(PlanConfig(model=SMALL, gpus=2, global_batch_size=8, precision="fp16"))
    for option in shown(made):
        trained = cli.parse("train", train_flags(made.config, option))
        generate(trained.train, trained.optimizer, trained.deepspeed, world_size=2, device="cuda")


def test_the_command_of_the_documentation_says_what_it_assumes_within_seconds(capsys):
    start = time.process_time()
    cli.main(["plan", "--preset", "XXL", "--gpus", "8", "--gpu", "h100-80g"])
    assert time.process_time() - start < 15  # 3 s where nothing else runs
    out = capsys.readouterr().out
    assert "1036.8M parameters, parity, batch 256 on 8 x h100-80g" in out and "fits best: ZeRO 1" in out
    assert "798 TFLOP/s dense bf16, 3 TB/s of memory, 450 GB/s to the others of its node (8 to a node), 50 GB/s" in out
    assert "bytes per parameter: weight 4, gradient 4, moments 8, averages 4" in out
    assert "deepspeed --num_gpus 8 --module sfd_fast train --preset XXL" in out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": "h100"}, "gpu 'h100' is unknown; choose a100-40g"),
        ({"gpu": "h100-80"}, "did you mean 'h100-80g'"),
        ({"gpus": 0}, "gpus 0 must be at least 1"),
        ({"gpus": 7}, "global_batch_size 256 must be a multiple of the 7 gpus"),
    ],
)
def test_impossible_plans_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(model=S, **settings)


def test_the_gpus_to_choose_from_are_those_of_the_table():
    assert get_args(annotations(PlanConfig)["gpu"]) == tuple(DEVICES)
