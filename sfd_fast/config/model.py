"""The networks: sizes of the velocity model, the semantic autoencoder and the texture autoencoder."""

from dataclasses import dataclass
from typing import Literal

from sfd_fast.config.checks import Count, Decay, Natural, NotNegative, Settings, require


@dataclass(frozen=True)
class ModelConfig(Settings, section="model"):
    """LightningDiT over the composite latent [texture | semantic] (docs/METHOD.md 3)."""

    hidden_size: Count = 1152
    """width D; divisible by 4 and by num_heads"""
    depth: Count = 28
    num_heads: Count = 16
    patch_size: Count = 1
    grid_size: Count = 16
    """height and width of the latent"""
    texture_channels: Natural = 32
    """all channels on the texture clock (PCA features of older caches included)"""
    semantic_channels: Natural = 16
    num_classes: Count = 1000
    class_dropout: Decay = 0.1
    """labels replaced by the null class, the row after the others; 0: there is no such row, and no guidance by CFG"""
    two_clocks: bool = True
    """two timestep embedders (delta_t > 0) or one (delta_t = 0)"""
    use_shift: bool = True
    """adaLN with shifts; the released `wo_shift` is its opposite"""
    use_qk_norm: bool = True
    use_rope: bool = True
    repa_channels: Natural = 768
    """width of the VFM features that the REPA head predicts; 0 builds no head"""
    repa_depth: Natural = 2
    """the head reads the output of this block, counted from 1"""
    repa_hidden: Count = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.hidden_size % (4 * self.num_heads) == 0,
            f"hidden_size {self.hidden_size} must be divisible by 4 * num_heads = {4 * self.num_heads} "
            "(2-D rotary embedding turns pairs along two axes)",
        )
        require(
            self.grid_size % self.patch_size == 0,
            f"grid_size {self.grid_size} must be divisible by patch_size {self.patch_size}",
        )
        require(self.channels > 0, "texture_channels + semantic_channels must be greater than 0")
        require(
            self.repa_channels == 0 or 1 <= self.repa_depth <= self.depth,
            f"repa_depth {self.repa_depth} must be a block number, 1 to depth = {self.depth}",
        )

    @property
    def num_labels(self) -> int:
        """Rows of the label table (docs/METHOD.md 3)."""
        return self.num_classes + (self.class_dropout > 0)

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
class SemVAEConfig(Settings, section="semvae"):
    """The semantic autoencoder of VFM features (docs/METHOD.md 2)."""

    architecture: Literal["transformer", "linear", "mlp", "resnet", "pca"] = "transformer"
    feature_channels: Count = 768
    hidden_size: Count = 768
    num_heads: Count = 6
    encoder_depth: Natural = 4
    """transformer or residual blocks"""
    decoder_depth: Natural = 4
    num_layers: Count = 2
    """layers of the MLP (architectures mlp and resnet)"""
    latent_channels: Count = 16
    kl_weight: NotNegative = 1e-7
    cosine_axis: Literal["features", "tokens"] = "features"
    """of the loss: features as in the paper, tokens as in the released script"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size {self.hidden_size} must be divisible by num_heads {self.num_heads}",
        )


@dataclass(frozen=True)
class TextureConfig(Settings, section="texture"):
    """The KL autoencoder of the LDM family; the defaults are the released f16d32 one (docs/METHOD.md 2)."""

    channels: Count = 128
    channel_multipliers: tuple[Count, ...] = (1, 1, 2, 2, 4)
    """one level each; every level but the last halves height and width"""
    num_res_blocks: Count = 2
    latent_channels: Count = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.channels % 32 == 0,
            f"channels {self.channels} must be a multiple of 32 (GroupNorm has 32 groups)",
        )

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)
