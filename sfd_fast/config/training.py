"""All that a training run is made from: losses, the run itself, the engine, and the whole of both."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from sfd_fast.config.checks import (
    MAY_CHANGE,
    Count,
    FilePath,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Precision,
    Settings,
    one_of,
    require,
)
from sfd_fast.config.data import DataConfig, FeatureDataConfig
from sfd_fast.config.model import ModelConfig, SemVAEConfig
from sfd_fast.config.optimizer import OptimizerConfig
from sfd_fast.config.run import RunConfig
from sfd_fast.config.sampling import GuidanceConfig, SamplerConfig, require_null_class

TrainingPrecision = Literal["parity", "bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class TransportConfig(Settings, section="transport"):
    """Clocks and losses of training (docs/METHOD.md 4)."""

    delta_t: Fraction = 0.3
    """how far semantics lead texture; 0 is synchronous, 1 strictly serial"""
    time_distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    """uniform: paper; logit_normal(0, 1): released configurations"""
    velocity_loss: bool = True
    semantic_weight: NotNegative = 2.0
    """weight of semantic channels in the velocity loss (beta)"""
    cosine_loss: bool = True
    repa_weight: NotNegative = 1.0
    """lambda; 0 switches REPA off"""
    repa_mode: Literal["cos", "mse", "cos_mse"] = "cos"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.velocity_loss or self.cosine_loss,
            "velocity_loss and cosine_loss are both off: at least one of them must train the velocity",
        )


ON_PURPOSE = tuple(
    f"optimizer.{name}"
    for name in (
        "lr", "warmup_steps", "warmup_start", "schedule", "decay_start", "final_lr_ratio", "weight_decay",
        "max_grad_norm", "beta1", "beta2", "eps", "ema_decay", "ema_warmup",
    )
)  # fmt: skip
"""what train.change may name: nothing that is stored depends on these"""


@dataclass(frozen=True)
class TrainConfig(Settings, section="train"):
    """What a training run computes, and with what."""

    max_steps: Annotated[Natural, MAY_CHANGE] = 400_000
    """0 (for SemVAE alone): as many as the data ask for, 50 epochs of them, 2,000 to 1,000,000 steps"""
    global_batch_size: Count = 256
    micro_batch_size: Annotated[Natural, MAY_CHANGE] = 0
    """samples per forward on one rank; 0: the whole share of a rank at once"""
    seed: int = 0
    precision: Literal["auto", TrainingPrecision] = "auto"
    """parity: fp32 weights under bf16 autocast, as released; bf16: bf16 weights, fp32 masters; fp16: loss scaling;
    auto: parity, but fp32 on a CPU without bf16 units, where that is faster"""
    compile: Annotated[bool, MAY_CHANGE] = False
    """torch.compile the network"""
    checkpoint_activations: Annotated[Fraction, MAY_CHANGE] = 0.0
    """share of the blocks whose activations are recomputed, 0 to 1"""
    residual: Precision = "fp32"
    """dtype of the residual stream; fp32 is the released network's, bf16 moves fewer bytes"""
    attention: Annotated[
        Literal["auto", "flash4", "flash3", "flash2", "xformers", "cudnn", "sfd", "sdpa"], MAY_CHANGE
    ] = "auto"
    """library behind attention; auto takes what fits, on a GPU the fastest (measured once, kept on disk)"""
    deterministic: Annotated[bool, MAY_CHANGE] = False
    """CUDA: only algorithms that sum in a fixed order, so that a resumed run is the unbroken one's to the bit"""
    cuda_graph: Annotated[bool, MAY_CHANGE] = False
    """launch a whole step at once: saves the host's time where batches are small; holds its activations for good"""
    engine: Annotated[Literal["torch", "deepspeed"], MAY_CHANGE] = "torch"
    """torch: one process; deepspeed: one or many ranks, see `deepspeed`"""
    init_from: Annotated[FilePath, MAY_CHANGE] = ""
    """weights to start from (our directory or a released .pt); empty: random"""
    init_classes: Annotated[Literal["same", "new"], MAY_CHANGE] = "same"
    """new: the label table starts anew, but for the null class, because the classes are others"""
    max_bad_steps: Annotated[Count, MAY_CHANGE] = 20
    """stop after so many non-finite losses or gradients in a row"""
    change: Annotated[str | tuple[str, ...], MAY_CHANGE] = ()
    """settings of the optimizer that differ on purpose from the run's so far, as [optimizer.lr, optimizer.schedule]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = self.change.replace(",", " ").split() if isinstance(self.change, str) else self.change
        object.__setattr__(self, "change", tuple(one_of("train.change", key, ON_PURPOSE) for key in keys))
        require(
            self.micro_batch_size == 0 or self.global_batch_size % self.micro_batch_size == 0,
            f"global_batch_size {self.global_batch_size} must be a multiple of micro_batch_size "
            f"{self.micro_batch_size}",
        )
        require(
            not self.cuda_graph or self.engine == "torch",
            "train.cuda_graph needs train.engine 'torch': DeepSpeed decides on the host within its step",
        )


@dataclass(frozen=True)
class DeepSpeedConfig(Settings, section="deepspeed", may_change=True):
    """How the DeepSpeed engine shares the work among ranks; the JSON that DeepSpeed gets is made from it."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """what is sharded: 0 nothing, 1 moments and averages, 2 gradients too, 3 weights too"""
    offload_optimizer: bool = False
    """masters, moments and averages in host memory"""
    offload_parameters: bool = False
    """ZeRO 3: weights in host memory between uses"""
    config_file: FilePath = ""
    """DeepSpeed JSON whose keys override the generated ones"""
    timeout_s: Positive = 1800.0
    """a rank that does not answer for so long ends the run with an error"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.offload_parameters or self.zero_stage == 3,
            f"offload_parameters needs zero_stage 3 (weights are whole in stage {self.zero_stage})",
        )
        require(
            not self.offload_optimizer or self.zero_stage >= 1,
            "offload_optimizer needs zero_stage 1, 2 or 3: stage 0 is not sharded at all",
        )


@dataclass(frozen=True)
class SFDConfig(Settings):
    """All that one diffusion training run is made from; saved with every checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.train.max_steps > 0, "train.max_steps must be at least 1: only SemVAE takes its length from data")
        require(
            self.model.two_clocks == (self.transport.delta_t > 0),
            f"model.two_clocks is {self.model.two_clocks} but transport.delta_t is {self.transport.delta_t}: "
            "two clocks need delta_t > 0, and delta_t = 0 has one clock",
        )
        require(
            self.transport.repa_weight == 0 or self.model.repa_channels > 0,
            "transport.repa_weight is above 0 but model.repa_channels is 0: there is no REPA head to train; "
            "set repa_weight to 0 or repa_channels to the VFM's width",
        )
        require_null_class(self.guidance, self.model)


@dataclass(frozen=True)
class SemVAETrainingConfig(Settings):
    """All that one SemVAE training run is made from. Defaults: the released recipe (docs/METHOD.md 2)."""

    semvae: SemVAEConfig = field(default_factory=SemVAEConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=5e-5, weight_decay=0.01, warmup_steps=500, warmup_start=0.01, schedule="cosine", decay_start=800_500,
            final_lr_ratio=0.1, ema_decay=0.0,
        )
    )  # fmt: skip
    data: FeatureDataConfig = field(default_factory=FeatureDataConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(max_steps=0, global_batch_size=64))
    run: RunConfig = field(
        default_factory=lambda: RunConfig(out="runs/semvae", sample_every=0, checkpoint_every=20_000)
    )
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
