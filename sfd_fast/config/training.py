"""All that a training run is made from: losses, the run itself, the engine, and the whole of both."""

from dataclasses import dataclass, field
from typing import Literal

from sfd_fast.config.checks import Precision, require, require_positive
from sfd_fast.config.data import DataConfig, FeatureDataConfig
from sfd_fast.config.model import ModelConfig, SemVAEConfig
from sfd_fast.config.optimizer import OptimizerConfig
from sfd_fast.config.sampling import GuidanceConfig, SamplerConfig

TrainingPrecision = Literal["parity", "bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class TransportConfig:
    """Clocks and losses of training (docs/METHOD.md 4)."""

    delta_t: float = 0.3
    """how far semantics lead texture; 0 is synchronous, 1 strictly serial"""
    time_distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    """uniform: paper; logit_normal(0, 1): released configurations"""
    velocity_loss: bool = True
    semantic_weight: float = 2.0
    """weight of semantic channels in the velocity loss (beta)"""
    cosine_loss: bool = True
    repa_weight: float = 1.0
    """lambda; 0 switches REPA off"""
    repa_mode: Literal["cos", "mse", "cos_mse"] = "cos"

    def __post_init__(self) -> None:
        require(0 <= self.delta_t <= 1, f"delta_t {self.delta_t} must be in [0, 1]")
        require(self.semantic_weight >= 0, f"semantic_weight {self.semantic_weight} must not be negative")
        require(self.repa_weight >= 0, f"repa_weight {self.repa_weight} must not be negative (0 switches REPA off)")
        require(
            self.velocity_loss or self.cosine_loss,
            "velocity_loss and cosine_loss are both off: at least one of them must train the velocity",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    out: str = "runs/train"
    max_steps: int = 400_000
    global_batch_size: int = 256
    micro_batch_size: int = 0
    """samples per forward on one rank; 0: the whole share of a rank at once"""
    seed: int = 0
    precision: TrainingPrecision = "parity"
    """parity: fp32 weights under bf16 autocast, as released; bf16: bf16 weights, fp32 masters; fp16: loss scaling"""
    compile: bool = False
    """torch.compile the network"""
    checkpoint_activations: float = 0.0
    """share of the blocks whose activations are recomputed"""
    residual: Precision = "fp32"
    """dtype of the residual stream; fp32 is the released network's, bf16 moves fewer bytes"""
    attention: Literal["auto", "flash4", "flash3", "flash2", "xformers", "sdpa"] = "auto"
    """library behind attention; auto takes the best that is installed and fits"""
    log_every: int = 50
    validate_every: int = 5_000
    sample_every: int = 10_000
    """sample grids into TensorBoard; 0 never"""
    eval_every: int = 0
    """judge generated images as `sfd evaluate` does; 0 never"""
    eval_images: int = 10_000
    """images drawn for it, with the averaged weights, the classes in turn; FID falls as they grow: 50,000 are usual"""
    eval_reference: str = ""
    """npz with images or statistics, or a folder of images"""
    eval_features: Literal["inception", "dinov2", "digits"] = "inception"
    eval_weights: str = ""
    """of the features; empty: their default place (see `sfd evaluate --weights`)"""
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 3
    max_bad_steps: int = 20
    """stop after so many non-finite losses or gradients in a row"""
    spike_factor: float = 10.0
    """a gradient norm above this multiple of its running median is reported"""
    init_from: str = ""
    """weights to start from (our directory or a released .pt); empty: random"""
    init_classes: Literal["same", "new"] = "same"
    """new: the label table starts anew, but for the null class, because the classes are others"""
    engine: Literal["torch", "deepspeed"] = "torch"
    """torch: one process; deepspeed: one or many ranks, see `deepspeed`"""
    num_sample_images: int = 16
    """images of a sample grid"""
    tensorboard: bool = True
    peak_tflops: float = 0.0
    """of one device in the run's precision: MFU is logged against it; 0 logs TFLOP/s alone"""
    profile_steps: int = 0
    """steps recorded by torch.profiler into <out>/profile; 0 none"""
    profile_start: int = 10
    """the first recorded step of a run or continuation, counted from its start"""
    nvtx: bool = False
    """NVTX ranges for data, step, validation and checkpoints, for Nsight Systems"""

    def __post_init__(self) -> None:
        require_positive(
            self, "max_steps", "global_batch_size", "log_every", "checkpoint_every", "keep_checkpoints",
            "max_bad_steps", "spike_factor",
        )  # fmt: skip
        for name in (
            "validate_every", "sample_every", "eval_every", "micro_batch_size", "peak_tflops", "profile_steps",
            "profile_start",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative")
        require(
            self.num_sample_images > 0,
            f"num_sample_images {self.num_sample_images} must be greater than 0; sample_every 0 draws no sample grids",
        )
        require(
            self.eval_every == 0 or bool(self.eval_reference),
            "train.eval_every is set, but train.eval_reference is empty: give an npz with images or statistics, or a "
            "folder of images, to compare with",
        )
        require(self.eval_images >= 2, f"eval_images {self.eval_images} must be at least 2 (a covariance needs two)")
        require(
            self.eval_features in ("inception", "dinov2", "digits"),
            f"eval_features '{self.eval_features}' is unknown; choose inception, dinov2 or digits",
        )
        require(
            0 <= self.checkpoint_activations <= 1,
            f"checkpoint_activations {self.checkpoint_activations} is a share of the blocks, 0 to 1",
        )
        require(
            self.micro_batch_size == 0 or self.global_batch_size % self.micro_batch_size == 0,
            f"global_batch_size {self.global_batch_size} must be a multiple of micro_batch_size "
            f"{self.micro_batch_size}",
        )


@dataclass(frozen=True)
class DeepSpeedConfig:
    """How the DeepSpeed engine shares the work among ranks; the JSON that DeepSpeed gets is made from it."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """what is sharded: 0 nothing, 1 moments and averages, 2 gradients too, 3 weights too"""
    offload_optimizer: bool = False
    """masters, moments and averages in host memory"""
    offload_parameters: bool = False
    """ZeRO 3: weights in host memory between uses"""
    config_file: str = ""
    """DeepSpeed JSON whose keys override the generated ones"""
    timeout_s: float = 1800.0
    """a rank that does not answer for so long ends the run with an error"""

    def __post_init__(self) -> None:
        require_positive(self, "timeout_s")
        require(
            not self.offload_parameters or self.zero_stage == 3,
            f"offload_parameters needs zero_stage 3 (weights are whole in stage {self.zero_stage})",
        )
        require(
            not self.offload_optimizer or self.zero_stage >= 1,
            "offload_optimizer needs zero_stage 1, 2 or 3: stage 0 is not sharded at all",
        )


@dataclass(frozen=True)
class SFDConfig:
    """All that one diffusion training run is made from; saved with every checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class SemVAETrainingConfig:
    """All that one SemVAE training run is made from. Defaults: the released recipe (docs/METHOD.md 2)."""

    semvae: SemVAEConfig = field(default_factory=SemVAEConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=5e-5, weight_decay=0.01, warmup_steps=500, schedule="cosine", decay_start=800_000, final_lr_ratio=0.1,
            ema_decay=0.0,
        )
    )  # fmt: skip
    data: FeatureDataConfig = field(default_factory=FeatureDataConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            out="runs/semvae", max_steps=1_000_000, global_batch_size=64, sample_every=0, checkpoint_every=20_000
        )
    )
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
