"""Capacity planner: memory per rank and a lower bound of the step time, for a model on so many devices.

Nothing runs on the devices in question. Memory is counted part by part as the engines allocate it (activations by
footprint.py) and compared with two-rank runs in tests/planning. Times are bounds from operation counts, bytes and link
speed, not predictions: no measured run on such a cluster stands behind them.
"""

import functools
from dataclasses import dataclass, field
from typing import Literal

import torch

from sfd_fast.config import DeepSpeedConfig, ModelConfig, OptimizerConfig, TrainConfig, TransportConfig, require
from sfd_fast.models.dit import LightningDiT, num_flops
from sfd_fast.planning.footprint import step_bytes
from sfd_fast.training.engines.deepspeed_json import BUCKETS, generate
from sfd_fast.training.engines.interface import stays_fp32

GIB = 2**30
BLOCK_BYTES_PER_CHANNEL = 123
"""bytes that the fused operators of one block move per token and channel, forward and backward, counted by hand"""


@dataclass(frozen=True)
class Device:
    """What a bound needs to know of a device; speeds are those of data sheets unless said otherwise."""

    memory_gib: float
    flops: float
    """dense bf16 operations per second"""
    bandwidth: float
    """bytes per second to its memory"""
    node_link: float
    """bytes per second and direction to the other devices of a node"""
    network_link: float
    """bytes per second and direction to other nodes, per device (each has a network card of its own)"""
    per_node: int = 8
    source: str = "data sheet"


DEVICES: dict[str, Device] = {
    #                       GiB   bf16     memory   in node  network
    "a100-40g": Device(40, 312e12, 1.55e12, 300e9, 25e9),
    "a100-80g": Device(80, 312e12, 2.0e12, 300e9, 25e9),
    "h100-80g": Device(80, 798e12, 3.0e12, 450e9, 50e9, source="sustained speeds, links of the data sheet"),
    "h200-141g": Device(141, 790e12, 4.3e12, 450e9, 50e9),
    "b200-180g": Device(180, 2250e12, 8.0e12, 900e9, 50e9),
    "rtx4090-24g": Device(24, 165e12, 1.0e12, 25e9, 3e9),
    "cpu": Device(24, 0.1e12, 10e9, 1e9, 1e9, source="a guess"),
}
RESERVE_GIB = 2.0
RESERVE_SHARE = 0.05
"""what the driver, NCCL and fragmentation take: an allowance, not a measurement"""


@dataclass(frozen=True)
class PlanConfig:
    """What to plan for."""

    model: ModelConfig = field(default_factory=ModelConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    gpus: int = 8
    """ranks"""
    gpu: str = "h100-80g"
    """one of the table in sfd_fast/training/plan.py"""
    global_batch_size: int = 256
    precision: Literal["parity", "bf16", "fp16", "fp32"] = "parity"
    residual: Literal["fp32", "bf16"] = "fp32"
    moments: Literal["fp32", "bf16"] = "fp32"
    extra_ema_decays: tuple[float, ...] = ()
    """further averages, as optimizer.extra_ema_decays"""
    memory_gib: float = 0.0
    """memory of a rank; 0: the device's"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra_ema_decays", tuple(self.extra_ema_decays))  # a JSON or YAML file gives a list
        require(self.gpu in DEVICES, f"gpu '{self.gpu}' is unknown; choose one of {', '.join(DEVICES)}")
        require(self.gpus >= 1, f"gpus {self.gpus} must be at least 1")
        require(
            self.global_batch_size % self.gpus == 0,
            f"global_batch_size {self.global_batch_size} must be a multiple of the {self.gpus} gpus",
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by part."""

    parameters: float
    """weights that the network computes with"""
    masters: float
    """fp32 copies of them, where the engine keeps any"""
    gradients: float
    """at the end of the backward pass"""
    moments: float
    averages: float
    activations: float
    """and other temporaries of forward and backward, at their most"""
    buffers: float
    """buckets of communication, gathered weights, and gradients that stay through a forward pass: ZeRO 3 never gives
    its partition back, accumulation sums into it
    """
    step: float
    """copies of gradients that the optimizer step needs, after activations are gone"""
    host: float = 0.0
    """in host memory, where offloaded"""

    @property
    def peak(self) -> float:
        """Whichever is more: forward and backward, whose gradients come as activations go, or the optimizer step."""
        held = self.parameters + self.masters + self.moments + self.averages + self.buffers
        return held + max(self.activations, self.gradients + self.step)


@functools.cache
def count_parameters(model: ModelConfig) -> tuple[int, int]:
    """(trained parameters, those of them that keep fp32 when weights have 16 bits)."""
    with torch.device("meta"):
        network = LightningDiT(model)
    keep = set(stays_fp32(network))
    trained = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
    return sum(trained.values()), sum(size for name, size in trained.items() if name in keep)


activation_bytes = functools.cache(step_bytes)
"""counted once for every stage that shares it"""


def memory(
    model: ModelConfig,
    transport: TransportConfig,
    *,
    world_size: int,
    zero_stage: int,
    micro_batch: int,
    checkpoint_activations: float = 0.0,
    precision: str = "parity",
    residual: str = "fp32",
    moments: str = "fp32",
    num_averages: int = 1,
    accumulate: bool = False,
    overlap: bool = True,
    offload_optimizer: bool = False,
    sizes: dict[str, int] | None = None,
) -> Memory:
    """Memory of one rank of the DeepSpeed engine.

    Per trained parameter on N ranks, w bytes of a weight and of its gradient (4, or 2 with 16-bit weights):
      ZeRO 0: weight w, moments 8, averages 4, gradient w, and w once more while gradients are reduced;
      ZeRO 1, 2: weight w; master 4, moments 8, averages 4, gradient w over N; the step copies gradients (w = 2: 2 + 4);
      ZeRO 3: all over N, no master for fp32 weights; the step copies one sub-group; gathered weights come on top.
    Norm weights, fp32 on every rank beside 16-bit weights, count in full. accumulate: gradients of several
    micro-batches are summed (in fp32). overlap: two communication buckets. sizes: elements, by DeepSpeed's names.
    """
    sizes = {name: value for name, (value, _) in BUCKETS.items()} | (sizes or {})
    trained, kept = count_parameters(model)
    low = precision in ("bf16", "fp16")
    weight = 2 if low else 4
    whole, sharded = (kept, trained - kept) if low else (0, trained)
    owned = sharded if zero_stage == 0 else sharded / world_size
    copied = weight + 4 if low else 4
    gradient = (4 if low and accumulate else weight) * owned
    buffers = step = held = 0.0
    if zero_stage == 0:
        step = weight * sharded if world_size > 1 else 0.0
    else:
        buffers = weight * sizes["reduce_bucket_size"] * (2 if overlap else 1)
        step = copied * (min(sizes["sub_group_size"], owned) if zero_stage == 3 else owned)
    if zero_stage == 3:
        # whole weights alive, and those on their way
        buffers += weight * min(sharded, sizes["stage3_max_live_parameters"] + sizes["stage3_prefetch_bucket_size"])
    if zero_stage == 3 or accumulate:
        held = gradient  # through the next forward pass
    state = {
        "masters": 0.0 if zero_stage == 0 or (zero_stage == 3 and not low) else 4 * owned,
        "moments": (8 if moments == "fp32" else 4) * (owned + whole),
        "averages": 4 * num_averages * (owned + whole),
    }
    host = 0.0
    if offload_optimizer:
        host, held, step = sum(state.values()) + 4 * owned, 0.0, 0.0
        gradient, state = 0.0, dict.fromkeys(state, 0.0)
    # gradients that stay matter where a small batch has few activations to give back
    activations = activation_bytes(
        model, transport, micro_batch=micro_batch, checkpoint_activations=checkpoint_activations, precision=precision,
        residual=residual, keep_gradients=zero_stage == 0 and micro_batch <= 4 and not accumulate,
    )  # fmt: skip
    return Memory(
        parameters=weight * (owned if zero_stage == 3 else sharded) + 4 * whole,
        gradients=gradient - held + 4 * whole,
        activations=activations,
        buffers=buffers + held,
        step=step,
        host=host,
        **state,
    )


@dataclass(frozen=True)
class Bound:
    """Lower bounds of the parts of a step, in seconds, and what follows."""

    products_s: float
    """matrix products and attention at the device's peak, recomputation included"""
    memory_s: float
    """fused operators of the blocks at the device's bandwidth"""
    optimizer_s: float
    communication_s: float
    """gradients and weights over the links, if these carried them at full speed all the time"""

    @property
    def step_s(self) -> float:
        """Computation one after the other; communication behind it where it fits."""
        return max(self.products_s + self.memory_s, self.communication_s) + self.optimizer_s


def bound(
    model: ModelConfig,
    device: Device,
    *,
    world_size: int,
    zero_stage: int,
    per_rank: int,
    checkpoint_activations: float,
    precision: str,
    num_averages: int = 1,
) -> Bound:
    """Bounds of one step of `per_rank` samples on each rank.

    Communication per step, P parameters of w bytes: gradients are reduced and scattered, weights gathered, ZeRO 3
    gathers them twice (forward and backward): 2 or 3 times w P. Of each, a rank of N, n to a node, must send
    (n - 1) / n to its node, and a node (1 - n / N) to others, over the network cards of all its devices at once; a ring
    or a tree sends no less. In a node both are at work together, so the slower one bounds.
    """
    total, _ = count_parameters(model)
    weight = 2 if precision in ("bf16", "fp16") else 4
    blocks = num_flops(model) * per_rank
    flops = num_flops(model, training=True) * per_rank + checkpoint_activations * blocks
    moved = BLOCK_BYTES_PER_CHANNEL * model.depth * model.num_tokens * model.hidden_size * per_rank
    moved *= 1 + checkpoint_activations / 3
    # master, two moments and the averages are read and written, the gradient read, the low-precision copy written
    touched = total * (24 + 8 * num_averages + weight + (weight if weight == 2 else 0))
    touched /= world_size if zero_stage >= 1 else 1
    sent = (3 if zero_stage == 3 else 2) * weight * total
    in_node = min(world_size, device.per_node)
    links = max(
        sent * (in_node - 1) / in_node / device.node_link,
        sent * (1 - in_node / world_size) / (in_node * device.network_link),
    )
    return Bound(flops / device.flops, moved / device.bandwidth, touched / device.bandwidth, links)


@dataclass(frozen=True)
class Option:
    """One way to run: a ZeRO stage, a micro-batch and a share of recomputed blocks."""

    zero_stage: int
    micro_batch: int
    checkpoint_activations: float
    memory: Memory
    bound: Bound
    fits: bool


@dataclass(frozen=True)
class Plan:
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


def plan(config: PlanConfig) -> Plan:
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
    return Plan(config, count_parameters(config.model)[0], limit, options, refused)
