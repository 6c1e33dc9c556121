"""Memory of one rank, part by part, as the engines allocate it; activations by footprint.py.

Compared with two-rank runs in tests/planning and tests/training/engines.
"""

import functools
from dataclasses import dataclass

import torch

from sfd_fast.config import ModelConfig, TransportConfig
from sfd_fast.models.dit import LightningDiT
from sfd_fast.planning.footprint import step_bytes
from sfd_fast.training.engines.deepspeed_json import BUCKETS
from sfd_fast.training.engines.interface import stays_fp32

GIB = 2**30


@dataclass(frozen=True)
class MemoryParts:
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
) -> MemoryParts:
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
    gradient = (4 if low and accumulate else weight) * owned
    buffers, step = buffer_bytes(sizes, zero_stage, world_size, weight, sharded, overlap=overlap)
    held = gradient if zero_stage == 3 or accumulate else 0.0  # through the next forward pass
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
    return MemoryParts(
        parameters=weight * (owned if zero_stage == 3 else sharded) + 4 * whole,
        gradients=gradient - held + 4 * whole,
        activations=activations,
        buffers=buffers + held,
        step=step,
        host=host,
        **state,
    )


def buffer_bytes(
    sizes: dict[str, int], zero_stage: int, world_size: int, weight: int, sharded: int, *, overlap: bool
) -> tuple[float, float]:
    """(buckets of communication and gathered weights, copies of gradients that the optimizer step needs)."""
    if zero_stage == 0:
        return 0.0, weight * sharded if world_size > 1 else 0.0
    buffers = weight * sizes["reduce_bucket_size"] * (2 if overlap else 1)
    copied = weight + 4 if weight == 2 else 4
    owned = sharded / world_size
    if zero_stage < 3:
        return buffers, copied * owned
    # whole weights alive, and those on their way
    alive = min(sharded, sizes["stage3_max_live_parameters"] + sizes["stage3_prefetch_bucket_size"])
    return buffers + weight * alive, copied * min(sizes["sub_group_size"], owned)
