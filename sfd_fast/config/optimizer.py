"""AdamW, its schedule, clipping and the averages of the weights."""

from dataclasses import dataclass
from typing import Literal

from sfd_fast.config.checks import Precision, require, require_positive


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, clipping and EMA."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    """linear from lr / warmup_steps"""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine decays to final_lr_ratio over the steps after decay_start"""
    decay_start: int = 0
    final_lr_ratio: float = 0.1
    max_grad_norm: float = 0.0
    """0: no clipping (the released recipe); the norm is logged in any case"""
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    """decay min(ema_decay, (1 + n) / (10 + n)) at update n = 0, 1, ...: early averages follow the weights"""
    extra_ema_decays: tuple[float, ...] = ()
    """further averages of the weights, kept in the optimizer's state as ema_1, ema_2, ..."""
    moments: Precision = "fp32"
    """dtype of the Adam moments (adamw_ema only); bf16 saves 4 bytes a parameter"""
    name: Literal["adamw_ema", "torch_fused", "deepspeed", "apex"] = "adamw_ema"
    """adamw_ema: AdamW and EMA in one pass; the others: that library's fused AdamW followed by an EMA pass"""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "eps")
        object.__setattr__(self, "extra_ema_decays", tuple(self.extra_ema_decays))  # a JSON or YAML file gives a list
        require(
            self.moments == "fp32" or self.name == "adamw_ema",
            f"moments in {self.moments} need the optimizer adamw_ema; {self.name} keeps them in fp32",
        )
        for decay in self.extra_ema_decays:
            require(0 <= decay < 1, f"extra_ema_decays {self.extra_ema_decays} must all be in [0, 1)")
        for name in ("beta1", "beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"{name} {getattr(self, name)} must be in [0, 1)")
        for name in ("weight_decay", "warmup_steps", "max_grad_norm", "decay_start", "final_lr_ratio"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative")
