"""A lower bound of a training step's time on a device, from operation counts, bytes and link speed.

Not a prediction: no measured run on such a cluster stands behind it.
"""

from dataclasses import dataclass

from sfd_fast.config import ModelConfig
from sfd_fast.models.dit import num_flops
from sfd_fast.planning.memory import count_parameters

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
