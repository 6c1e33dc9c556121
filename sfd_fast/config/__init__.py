"""Every setting of the system as frozen dataclasses, validated on construction; defaults stand only here.

Times are on the clock t = 0 noise, t = 1 data; the global time tau runs over [0, 1 + delta_t].
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["fp32", "bf16"]
TrainingPrecision = Literal["parity", "bf16", "fp16", "fp32"]


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless condition holds: for what a user got wrong."""
    if not condition:
        raise ValueError(message)


def require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} = {value} must be greater than 0")


@dataclass(frozen=True)
class ModelConfig:
    """LightningDiT over the composite latent [texture | semantic] (METHOD 3)."""

    hidden_size: int = 1152
    """width D; divisible by 4 and by num_heads"""
    depth: int = 28
    num_heads: int = 16
    patch_size: int = 1
    grid_size: int = 16
    """height and width of the latent"""
    texture_channels: int = 32
    """all channels on the texture clock (PCA features of older caches included)"""
    semantic_channels: int = 16
    num_classes: int = 1000
    """the null class is the row after them"""
    class_dropout: float = 0.1
    two_clocks: bool = True
    """two timestep embedders (delta_t > 0) or one (delta_t = 0)"""
    use_shift: bool = True
    """adaLN with shifts; the released `wo_shift` is its opposite"""
    use_qk_norm: bool = True
    use_rope: bool = True
    repa_channels: int = 768
    """width of the VFM features that the REPA head predicts; 0 builds no head"""
    repa_depth: int = 2
    """the head reads the output of this block, counted from 1"""
    repa_hidden: int = 2048

    def __post_init__(self) -> None:
        require_positive(self, "hidden_size", "depth", "num_heads", "patch_size", "grid_size", "num_classes")
        require(
            self.hidden_size % (4 * self.num_heads) == 0,
            f"hidden_size {self.hidden_size} must be divisible by 4 * num_heads = {4 * self.num_heads} "
            "(2-D rotary embedding turns pairs along two axes)",
        )
        require(
            self.grid_size % self.patch_size == 0,
            f"grid_size {self.grid_size} must be divisible by patch_size {self.patch_size}",
        )
        require(self.texture_channels >= 0 and self.semantic_channels >= 0, "channel counts must not be negative")
        require(self.channels > 0, "texture_channels + semantic_channels must be greater than 0")
        require(0 <= self.class_dropout < 1, f"class_dropout {self.class_dropout} must be in [0, 1)")
        require(
            self.repa_channels == 0 or 1 <= self.repa_depth <= self.depth,
            f"repa_depth {self.repa_depth} must be a block number, 1 to depth = {self.depth}",
        )

    @property
    def channels(self) -> int:
        return self.texture_channels + self.semantic_channels

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_tokens(self) -> int:
        return (self.grid_size // self.patch_size) ** 2

    @property
    def mlp_hidden(self) -> int:
        return int(2 / 3 * 4 * self.hidden_size)


@dataclass(frozen=True)
class TransportConfig:
    """Clocks and losses of training (METHOD 4)."""

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
class GuidanceConfig:
    """How sampling is guided (METHOD 5). Separate scales default to `scale`."""

    mode: Literal["none", "cfg", "autoguidance"] = "none"
    scale: float = 1.0
    texture_scale: float | None = None
    semantic_scale: float | None = None
    interval_start: float = 0.0
    """below this time of a stream's own clock that stream is not guided"""
    interval_mode: Literal["both", "tex", "sem"] = "both"
    """streams to which the interval applies; the other stays guided"""

    def __post_init__(self) -> None:
        require(
            0 <= self.interval_start <= 1, f"guidance interval_start {self.interval_start} must be in [0, 1]"
        )
        separate = self.texture_scale is not None or self.semantic_scale is not None
        require(
            self.mode != "none" or (self.scale == 1.0 and not separate),
            "a guidance scale is set while guidance mode is 'none'; set guidance.mode (`sfd sample`: "
            "--guidance_mode) to 'cfg' or 'autoguidance'",
        )

    @property
    def scales(self) -> tuple[float, float]:
        """(texture, semantic) weight w in v_weak + w (v_main - v_weak); 1 changes nothing."""
        texture = self.scale if self.texture_scale is None else self.texture_scale
        semantic = self.scale if self.semantic_scale is None else self.semantic_scale
        return texture, semantic

    @property
    def active(self) -> bool:
        return self.mode != "none" and self.scales != (1.0, 1.0)


@dataclass(frozen=True)
class SamplerConfig:
    """The ODE solver over tau in [0, 1 + delta_t] (METHOD 5)."""

    solver: Literal["euler", "midpoint", "heun", "ab2", "abm3", "rk4", "dopri5"] = "abm3"
    """abm3 needs the fewest evaluations for a given error (benchmarks/sampling.py)"""
    num_steps: int = 32
    """steps over the whole interval; network evaluations are as many (heun and midpoint: twice, rk4: four times)"""
    grid: Literal["exact", "released"] = "exact"
    """exact: stage borders are grid points; released: num_steps + 1 even points, masks at each evaluation"""
    timestep_shift: float = 1.0
    """u' = s u / (1 + (s - 1) u) on normalised time; 1 changes nothing"""
    atol: float = 1e-6
    rtol: float = 1e-3
    """tolerances of dopri5 only"""

    def __post_init__(self) -> None:
        require_positive(self, "num_steps", "timestep_shift", "atol", "rtol")


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


@dataclass(frozen=True)
class DataConfig:
    """Latent shards to train on."""

    path: str = ""
    """folder of *.safetensors shards with their statistics; also s3://, gs://, hf:// and other fsspec addresses"""
    cache_folder: str = ""
    """local folder for a copy of what lies on remote storage"""
    validation_path: str = ""
    """held-out shards; empty: `validation_samples` of `path` are held out"""
    validation_samples: int = 0
    """held-out samples, spread over the whole cache, so that every class has its share"""
    latent_multiplier: float = 1.0
    flip: bool = True
    """flipped and plain latents with probability 1/2"""
    num_workers: int = 2
    """threads that gather and normalise ahead of the step; the order does not depend on it"""
    texture_codec: str = ""
    """texture autoencoder for sample grids during training; empty: texture channels are shown as pixels"""
    targets: Literal["stored", "semvae", "online"] = "stored"
    """VFM features for REPA: stored in the cache, decoded from its semantic latents, or computed from the images"""
    semvae: str = ""
    """targets semvae: the SemVAE that the cache was encoded with"""
    vfm: str = ""
    """targets online: the VFM that the cache was encoded with, a directory or hub id"""
    images: str = ""
    """targets online: where the images of `path` are now, if they moved since they were encoded"""

    def __post_init__(self) -> None:
        require_positive(self, "latent_multiplier")
        require(self.num_workers >= 0, f"num_workers {self.num_workers} must not be negative")
        require(self.validation_samples >= 0, "validation_samples must not be negative")
        require(
            self.targets in ("stored", "semvae", "online"),
            f"data.targets '{self.targets}' is unknown; choose stored, semvae or online",
        )
        for name, kind in (("semvae", "semvae"), ("vfm", "online"), ("images", "online")):
            require(
                not getattr(self, name) or self.targets == kind,
                f"data.{name} is given, but data.targets is '{self.targets}', which does not use it: set data.targets "
                f"to '{kind}', or leave data.{name} out",
            )
        for name, kind in (("semvae", "semvae"), ("vfm", "online")):
            require(
                bool(getattr(self, name)) or self.targets != kind,
                f"data.targets '{kind}' needs data.{name}: the one that the cache was encoded with",
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
class SemVAEConfig:
    """The semantic autoencoder of VFM features (METHOD 2)."""

    architecture: Literal["transformer", "linear", "mlp", "resnet", "pca"] = "transformer"
    feature_channels: int = 768
    hidden_size: int = 768
    num_heads: int = 6
    encoder_depth: int = 4
    """transformer or residual blocks"""
    decoder_depth: int = 4
    num_layers: int = 2
    """layers of the MLP (architectures mlp and resnet)"""
    latent_channels: int = 16
    kl_weight: float = 1e-7

    def __post_init__(self) -> None:
        require_positive(self, "feature_channels", "hidden_size", "num_heads", "latent_channels", "num_layers")
        require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size {self.hidden_size} must be divisible by num_heads {self.num_heads}",
        )
        require(self.kl_weight >= 0, f"kl_weight {self.kl_weight} must not be negative")


@dataclass(frozen=True)
class TextureConfig:
    """The KL autoencoder of the LDM family; the defaults are the released f16d32 one (METHOD 2)."""

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """one level each; every level but the last halves height and width"""
    num_res_blocks: int = 2
    latent_channels: int = 32

    def __post_init__(self) -> None:
        require_positive(self, "channels", "num_res_blocks", "latent_channels")
        # a JSON or YAML file gives a list
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        require(
            self.channels % 32 == 0,
            f"channels {self.channels} must be a multiple of 32 (GroupNorm has 32 groups)",
        )

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)


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
class FeatureDataConfig:
    """Shards of VFM features to train SemVAE on."""

    path: str = ""
    """folder (or fsspec address) of *.safetensors shards with feats_dino (N, F, h, w), of `sfd features` or latents"""
    cache_folder: str = ""
    """local folder for a copy of what lies on remote storage"""
    validation_samples: int = 0
    """held-out samples, spread over the whole set"""
    flip: bool = True
    """flipped and plain features with probability 1/2; needs shards with both, as `sfd features` writes them"""

    def __post_init__(self) -> None:
        require(self.validation_samples >= 0, "validation_samples must not be negative")


@dataclass(frozen=True)
class SemVAETrainingConfig:
    """All that one SemVAE training run is made from. Defaults: the released recipe (METHOD 2)."""

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


def to_dict(config: object) -> dict:
    """A dataclass tree as plain dictionaries, ready for JSON or YAML."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict) -> object:
    """The inverse of to_dict; an unknown key is a ValueError that names the nearest valid one."""
    import difflib

    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; valid keys: {', '.join(fields)}"
            raise ValueError(f"unknown key '{key}' for {kind.__name__}{hint}")
    built = {}
    for key, value in values.items():
        nested = fields[key].type
        if isinstance(nested, type) and dataclasses.is_dataclass(nested) and isinstance(value, dict):
            value = from_dict(nested, value)
        built[key] = value
    return kind(**built)
