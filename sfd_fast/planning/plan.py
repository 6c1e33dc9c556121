"""Capacity planner: which ZeRO stage, micro-batch and recomputation fit a device, and how fast they could be at best.

Nothing runs on the devices in question.
"""

from dataclasses import dataclass

from sfd_fast.config import DeepSpeedConfig, OptimizerConfig, TrainConfig
from sfd_fast.config.planning import PlanConfig
from sfd_fast.planning.memory import GIB, MemoryParts, count_parameters, memory
from sfd_fast.planning.time_bound import DEVICES, Bound, bound
from sfd_fast.training.engines.deepspeed_json import generate

RESERVE_GIB = 2.0
RESERVE_SHARE = 0.05
"""what the driver, NCCL and fragmentation take: an allowance, not a measurement"""


@dataclass(frozen=True)
class Option:
    """One way to run: a ZeRO stage, a micro-batch and a share of recomputed blocks."""

    zero_stage: int
    micro_batch: int
    checkpoint_activations: float
    memory: MemoryParts
    bound: Bound
    fits: bool


@dataclass(frozen=True)
class CapacityPlan:
    config: PlanConfig
    num_parameters: int
    limit_gib: float
    options: list[Option]
    """per stage and share of recomputed blocks, from the largest micro-batch down to the first that fits"""
    refused: list[str]
    """combinations that training would refuse, with the reason"""

    @property
    def best(self) -> Option | None:
        """The fitting option of least bounded step time; between equals the lower stage and the larger micro-batch."""
        fitting = [o for o in self.options if o.fits]
        return min(fitting, key=lambda o: (o.bound.step_s, o.zero_stage, -o.micro_batch), default=None)


def micro_batches(per_rank: int) -> list[int]:
    """At most four divisors of a rank's share, each at most half the one before: all of it first."""
    sizes = [per_rank]
    for size in range(per_rank // 2, 0, -1):
        if per_rank % size == 0 and size <= sizes[-1] // 2 and len(sizes) < 4:
            sizes.append(size)
    return sizes


def refusal(config: PlanConfig, zero_stage: int, micro_batch: int) -> str:
    """Why training would refuse a stage and micro-batch; empty where it would not."""
    train = TrainConfig(
        global_batch_size=config.global_batch_size, micro_batch_size=micro_batch, precision=config.precision
    )
    try:
        generate(train, OptimizerConfig(), DeepSpeedConfig(zero_stage), world_size=config.gpus, device="cuda")
    except ValueError as error:
        return str(error)
    return ""


def plan(config: PlanConfig) -> CapacityPlan:
    """Every stage with none, half or all blocks recomputed, each with the largest micro-batch that fits.

    What cannot win is left out: a smaller micro-batch, or more recomputation for no larger a micro-batch, where one
    fits. What training would refuse is left out with its reason.
    """
    device = DEVICES[config.gpu]
    limit = (config.memory_gib or device.memory_gib) * (1 - RESERVE_SHARE)
    limit -= RESERVE_GIB if config.gpu != "cpu" else 0.0
    per_rank = config.global_batch_size // config.gpus
    options, refused = [], []
    for stage in (0, 1, 2, 3):
        reasons = {micro_batch: refusal(config, stage, micro_batch) for micro_batch in micro_batches(per_rank)}
        barred = [micro_batch for micro_batch, reason in reasons.items() if reason]
        if barred:
            sizes = ", ".join(map(str, barred))
            refused.append(f"ZeRO {stage} with micro-batch {sizes}: {reasons[barred[0]]}")
        allowed = [micro_batch for micro_batch, reason in reasons.items() if not reason]
        largest = 0
        for share in (0.0, 0.5, 1.0):
            common = {"world_size": config.gpus, "zero_stage": stage, "checkpoint_activations": share}
            common |= {"precision": config.precision, "num_averages": 1 + len(config.extra_ema_decays)}
            for micro_batch in (m for m in allowed if m > largest):
                needed = memory(
                    config.model, config.transport, micro_batch=micro_batch, residual=config.residual,
                    moments=config.moments, accumulate=micro_batch < per_rank, overlap=config.gpu != "cpu", **common,
                )  # fmt: skip
                least = bound(config.model, device, per_rank=per_rank, **common)
                options.append(Option(stage, micro_batch, share, needed, least, needed.peak <= limit * GIB))
                if options[-1].fits:
                    largest = micro_batch
                    break
    return CapacityPlan(config, count_parameters(config.model)[0], limit, options, refused)
