"""What `sfd plan` plans for."""

from dataclasses import dataclass, field
from typing import Literal

from sfd_fast.config.checks import Count, Decay, NotNegative, Precision, Settings, require
from sfd_fast.config.model import ModelConfig
from sfd_fast.config.training import TrainingPrecision, TransportConfig


@dataclass(frozen=True)
class PlanConfig(Settings):
    """What to plan for."""

    model: ModelConfig = field(default_factory=ModelConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    gpus: Count = 8
    """ranks"""
    gpu: Literal["a100-40g", "a100-80g", "h100-80g", "h200-141g", "b200-180g", "rtx4090-24g", "cpu"] = "h100-80g"
    """rows of the table in sfd_fast/planning/time_bound.py"""
    global_batch_size: Count = 256
    precision: TrainingPrecision = "parity"
    residual: Precision = "fp32"
    moments: Precision = "fp32"
    extra_ema_decays: tuple[Decay, ...] = ()
    """further averages, as optimizer.extra_ema_decays"""
    memory_gib: NotNegative = 0.0
    """memory of a rank; 0: the device's"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.global_batch_size % self.gpus == 0,
            f"global_batch_size {self.global_batch_size} must be a multiple of the {self.gpus} gpus",
        )
