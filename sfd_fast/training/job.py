"""What the training loop is given: everything that differs between training the transformer and training SemVAE."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sfd_fast.config import (
    DeepSpeedConfig,
    OptimizerConfig,
    RunConfig,
    SemVAETrainingConfig,
    SFDConfig,
    TrainConfig,
    require,
)
from sfd_fast.training.engines.interface import Batch, Engine, Objective


@dataclass(frozen=True)
class Job:
    """A network, its objective and its data, ready for any engine."""

    config: SFDConfig | SemVAETrainingConfig
    """saved with every checkpoint"""
    model: nn.Module
    objective: Objective
    terms: tuple[str, ...]
    """names of the loss terms that the objective returns"""
    batches: Callable[[int, "Engine"], Iterator[Batch]]
    """(start step, engine) -> this rank's share of the batch of every step from there on, on the engine's device"""
    export: Callable[[Path, dict[str, Tensor], int], None]
    """(folder, state dict, step) -> writes a loadable model"""
    evaluate: Callable[[Engine], dict[str, float]] | None = None
    """figures on held-out data, or None where there is none"""
    flaw: Callable[[int], str] | None = None
    """batch of a step, counted from 0 -> file and sample of a stored value that is not finite, or "\""""
    samples: Callable[[Engine], Tensor] | None = None
    """a picture (3, H, W) uint8 made with the averaged weights"""
    quality: Callable[..., Callable[[Callable[[], bool]], dict[str, float] | None]] | None = None
    """(engine, say=line taker) -> what judges generated images, made before the first step: see images.Quality"""
    bins: Callable[[Batch], Tensor] | None = None
    """clock bin of every sample, (B,) int64"""
    num_bins: int = 0
    identity: dict = field(default_factory=dict)
    """what a resumed run must find again, for example the fingerprint of the statistics"""
    fingerprint: str = ""
    """of the values of some samples: ranks that read other data are told apart by it"""
    record: dict = field(default_factory=dict)
    """what else a checkpoint's state.json holds, for example the statistics of the latents"""
    num_samples: int = 0
    """size of the training set, for epochs"""
    flops_per_sample: float = 0.0
    unit: str = "step"
    notes: tuple[str, ...] = ()
    """what a user should know of this run, one line each: said at its start and by the dry run"""

    @property
    def train(self) -> TrainConfig:
        return self.config.train

    @property
    def run(self) -> RunConfig:
        return self.config.run

    @property
    def optimizer(self) -> OptimizerConfig:
        return self.config.optimizer

    @property
    def deepspeed(self) -> DeepSpeedConfig:
        return self.config.deepspeed


def a_few(count: int) -> tuple[Tensor, Tensor]:
    """Numbers of up to 16 samples spread over a set, by whose values two copies of it are compared, none mirrored."""
    numbers = torch.linspace(0, count - 1, min(16, count)).long()
    return numbers, torch.zeros(len(numbers), dtype=torch.bool)


def check_default_dtype() -> None:
    """Raises ValueError where torch makes tensors of another dtype than fp32: the network would be another."""
    kind = torch.get_default_dtype()
    require(
        kind == torch.float32,
        f"torch's default dtype is {kind}; training needs torch.float32 (train.precision chooses how it computes): "
        "call torch.set_default_dtype(torch.float32)",
    )
