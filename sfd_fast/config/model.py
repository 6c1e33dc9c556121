"""The networks: sizes of the velocity model, the semantic autoencoder and the texture autoencoder."""

from dataclasses import dataclass
from typing import Literal

from sfd_fast.config.checks import require, require_positive


@dataclass(frozen=True)
class ModelConfig:
    """LightningDiT over the composite latent [texture | semantic] (docs/METHOD.md 3)."""

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
class SemVAEConfig:
    """The semantic autoencoder of VFM features (docs/METHOD.md 2)."""

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
    """The KL autoencoder of the LDM family; the defaults are the released f16d32 one (docs/METHOD.md 2)."""

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
