"""AdamW, its schedule, clipping and the averages of the weights."""

from dataclasses import dataclass
from typing import Literal

from sfd_fast.config.checks import Decay, Fraction, Natural, NotNegative, Positive, Precision, Settings, require


@dataclass(frozen=True)
class OptimizerConfig(Settings, section="optimizer"):
    """AdamW, its schedule, clipping and EMA."""

    lr: Positive = 1e-4
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    warmup_steps: Natural = 0
    """linear from lr / warmup_steps"""
    warmup_start: Fraction = 0.0
    """above 0: linear from this share of lr instead, as in the released SemVAE recipe (0.01)"""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine decays to final_lr_ratio over the steps after decay_start"""
    decay_start: Natural = 0
    final_lr_ratio: NotNegative = 0.1
    max_grad_norm: NotNegative = 0.0
    """0: no clipping (the released recipe); the norm is logged in any case"""
    ema_decay: Decay = 0.9999
    ema_warmup: bool = False
    """decay min(ema_decay, (1 + n) / (10 + n)) at update n = 0, 1, ...: early averages follow the weights"""
    extra_ema_decays: tuple[Decay, ...] = ()
    """further averages of the weights, kept in the optimizer's state as ema_1, ema_2, ..."""
    moments: Precision = "fp32"
    """dtype of the Adam moments (adamw_ema only); bf16 saves 4 bytes a parameter"""
    name: Literal["adamw_ema", "torch_fused", "deepspeed", "apex"] = "adamw_ema"
    """adamw_ema: AdamW and EMA in one pass; the others: that library's fused AdamW followed by an EMA pass"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.moments == "fp32" or self.name == "adamw_ema",
            f"moments in {self.moments} need the optimizer adamw_ema; {self.name} keeps them in fp32",
        )
