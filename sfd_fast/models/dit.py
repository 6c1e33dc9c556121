"""LightningDiT with two clocks: velocity of the composite latent [texture | semantic].

B batch, C channels, N tokens, D width, H heads, d = D / H, F channels of the vision features.
Parameter names, shapes and order are those of the released checkpoints.

Residual adds are delayed: a block hands over (x, branch, gate) with x + gate * branch still to be added, so that one
kernel adds the branch and applies the next norm.
"""

import torch
from sfd_kernels import (
    condition_silu,
    gated_residual_norm_modulate,
    rms_norm_modulate,
    split_qkv,
    swiglu,
    timestep_features,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfd_fast.config import ModelConfig, Precision
from sfd_fast.config.checks import one_of
from sfd_fast.files.tensors import float32_by_default
from sfd_fast.models.attention import attention
from sfd_fast.models.embeddings import (
    TIMESTEP_FEATURES,
    LabelEmbedder,
    PatchEmbed,
    RotaryEmbedding,
    TimestepEmbedder,
    position_embedding,
)
from sfd_fast.models.linear import Linear

EPS = 1e-6  # of every RMSNorm, docs/METHOD.md 3


class HeadNorm(nn.Module):
    """The weight of the RMSNorm over one head's d channels; `split_qkv` applies it."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


class ModulatedNorm(nn.Module):
    """RMSNorm with weight, then h * (1 + scale) + shift; first adds the pending branch where there is one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, branch: (B, N, D); gate, shift, scale: (B, D). Returns (x + gate * branch, modulated norm of it)."""
        if branch is None:
            return x, rms_norm_modulate(x, self.weight, shift, scale, EPS)
        return gated_residual_norm_modulate(x, branch, gate, self.weight, shift, scale, EPS)


class Attention(nn.Module):
    """Multi-head attention with per-head RMSNorm of q and k and rotary positions: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.backend = "auto"
        self.qkv = Linear(width, 3 * width)
        self.q_norm = HeadNorm(config.head_dim) if config.use_qk_norm else None
        self.k_norm = HeadNorm(config.head_dim) if config.use_qk_norm else None
        self.proj = Linear(width, width)

    def forward(self, h: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        batch, num_tokens, width = h.shape
        qkv = self.qkv(h).view(batch, num_tokens, 3, self.num_heads, width // self.num_heads)
        q_weight = None if self.q_norm is None else self.q_norm.weight
        k_weight = None if self.k_norm is None else self.k_norm.weight
        q, k, v = split_qkv(qkv, q_weight, k_weight, cos, sin, EPS)  # each (B, N, H, d)
        return self.proj(attention(q, k, v, backend=self.backend).reshape(batch, num_tokens, width))


class SwiGLU(nn.Module):
    """w3(SiLU(gate) * up) with [gate | up] = w12(h): (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w12 = Linear(config.hidden_size, 2 * config.mlp_hidden)
        self.w3 = Linear(config.mlp_hidden, config.hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return self.w3(swiglu(self.w12(h)))


class AdaLN(nn.Sequential):
    """Linear(c) -> `num_rows` modulation vectors of width D each; c arrives as SiLU(c), computed once per network call.

    The empty slot 0 stands for that SiLU and keeps the released name `adaLN_modulation.1`.
    """

    def __init__(self, width: int, num_rows: int) -> None:
        super().__init__(nn.Identity(), Linear(width, num_rows * width))
        self.num_rows = num_rows

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self[1](c).chunk(self.num_rows, dim=1)


class Block(nn.Module):
    """x += gate1 * attention(norm1(x) modulated);  x += gate2 * mlp(norm2(x) modulated), this add left pending."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(config.hidden_size)
        self.norm2 = ModulatedNorm(config.hidden_size)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.adaLN_modulation = AdaLN(config.hidden_size, 6 if config.use_shift else 4)

    def forward(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, c: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, branch: (B, N, D); gate, c: (B, D). Returns (entered, x, branch, gate); entered = x + gate * branch."""
        rows = self.adaLN_modulation(c)
        if len(rows) == 6:
            shift1, scale1, gate1, shift2, scale2, gate2 = rows
        else:
            shift1 = shift2 = None
            scale1, gate1, scale2, gate2 = rows
        entered, h = self.norm1(x, branch, gate, shift1, scale1)
        x, h = self.norm2(entered, self.attn(h, cos, sin), gate1, shift2, scale2)
        return entered, x, self.mlp(h), gate2


class FinalLayer(nn.Module):
    """Modulated norm, then Linear(D -> patch^2 * C): (B, N, D) -> (B, N, patch^2 * C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_final = ModulatedNorm(config.hidden_size)
        self.linear = Linear(config.hidden_size, config.patch_size**2 * config.channels)
        self.adaLN_modulation = AdaLN(config.hidden_size, 2)

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.adaLN_modulation(c)
        entered, h = self.norm_final(x, branch, gate, shift, scale)
        return entered, self.linear(h)


class LightningDiT(nn.Module):
    """Velocity v(x, t_tex, t_sem, label) of the composite latent. Source: docs/METHOD.md 3 (SFD on LightningDiT).

    residual: dtype of the residual stream, "fp32" (as released, also under bf16 autocast) or "bf16" (fewer bytes).
    attention_backend: a name of models.attention. checkpoint_activations: share of the blocks that are recomputed in
    the backward pass instead of kept, spread evenly.
    """

    @float32_by_default()
    def __init__(
        self,
        config: ModelConfig,
        *,
        residual: str = "fp32",
        attention_backend: str = "auto",
        checkpoint_activations: float = 0.0,
    ) -> None:
        super().__init__()
        one_of("residual", residual, Precision)
        if not 0 <= checkpoint_activations <= 1:
            raise ValueError(f"checkpoint_activations {checkpoint_activations} is a share of the blocks, 0 to 1")
        self.config = config
        self.residual = residual
        self.checkpoint_activations = checkpoint_activations
        width = config.hidden_size
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, width), requires_grad=False)
        self.x_embedder = PatchEmbed(config)
        if config.two_clocks:
            self.t_embedder_sem = TimestepEmbedder(width // 2)
            self.t_embedder_tex = TimestepEmbedder(width // 2)
        else:
            self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config)
        self.feat_rope = RotaryEmbedding(config) if config.use_rope else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.repa_projector = _repa_head(config) if config.repa_channels else None
        for block in self.blocks:
            block.attn.backend = attention_backend
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier-uniform Linears (packed ones as they are) with zero bias, normal(0, 0.02) label table and timestep
        MLPs, zero adaLN and final Linears, unit norm weights, fixed position embedding. Source: docs/METHOD.md 3."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, ModulatedNorm | HeadNorm):
                nn.init.ones_(module.weight)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.zeros_(patch.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, TimestepEmbedder):
                nn.init.normal_(module.mlp[0].weight, std=0.02)
                nn.init.normal_(module.mlp[2].weight, std=0.02)
            elif isinstance(module, AdaLN):
                nn.init.zeros_(module[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        self.pos_embed.copy_(
            position_embedding(self.config.grid_size // self.config.patch_size, self.config.hidden_size)
        )

    def forward(
        self,
        x: Tensor,
        t_tex: Tensor | None,
        t_sem: Tensor | None,
        labels: Tensor | None,
        *,
        return_features: bool = False,
        condition: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity of both streams; with return_features also what the REPA head predicts.

        x: (B, C, grid, grid) composite [texture | semantic]; t_tex, t_sem: (B,) clocks in [0, 1], kept in fp32 (with
        one clock only t_tex is read); labels: (B,) integers, num_classes means "no class"; condition: (B, D) from
        `condition`, computed beforehand, in which case clocks and labels are not read.
        Returns velocity (B, C, grid, grid), bf16 under bf16 autocast; features (B, N, F).
        Raises ValueError for another latent size, or for features of a model without a REPA head.
        """
        config = self.config
        if x.shape[1:] != (config.channels, config.grid_size, config.grid_size):
            expected = (config.channels, config.grid_size, config.grid_size)
            raise ValueError(f"latents of shape {tuple(x.shape)} were given; this model takes (B, {expected})")
        if return_features and self.repa_projector is None:
            raise ValueError("return_features needs a REPA head; this model's config has repa_channels = 0")

        dtype = self.pos_embed.dtype  # of the parameters; autocast casts further by itself
        c = self.condition(t_tex, t_sem, labels) if condition is None else condition
        x = self.x_embedder(x.to(dtype)) + self.pos_embed
        x = x.to(torch.bfloat16 if self.residual == "bf16" else torch.promote_types(x.dtype, torch.float32))
        cos, sin = (None, None) if self.feat_rope is None else self.feat_rope()
        branch = gate = features = None
        for index, block in enumerate(self.blocks):
            if self._recomputes(index):
                state = (x, branch, gate, c, cos, sin)
                entered, x, branch, gate = checkpoint(block, *state, use_reentrant=False, preserve_rng_state=False)
            else:
                entered, x, branch, gate = block(x, branch, gate, c, cos, sin)
            if return_features and index == config.repa_depth:  # what enters block k + 1 is the output of block k
                features = self.repa_projector(entered.to(dtype))
        entered, patches = self.final_layer(x, branch, gate, c)
        if return_features and features is None:
            features = self.repa_projector(entered.to(dtype))
        velocity = self._unpatchify(patches)
        return (velocity, features) if return_features else velocity

    def condition(self, t_tex: Tensor, t_sem: Tensor, labels: Tensor) -> Tensor:
        """SiLU([e_sem(t_sem) | e_tex(t_tex)] + e_label), (B, D); the first half alone with one clock."""
        return condition_silu(*self.embed_times(t_tex, t_sem), self.y_embedder(labels))

    def embed_times(self, t_tex: Tensor, t_sem: Tensor) -> tuple[Tensor, Tensor | None]:
        """(e_sem, e_tex), each (B, D / 2), of clocks (B,); with one clock (e(t_tex) (B, D), None)."""
        dtype = self.pos_embed.dtype
        clocks = torch.stack((t_tex, t_sem) if self.config.two_clocks else (t_tex,))
        clocks = clocks.to(torch.promote_types(clocks.dtype, torch.float32))
        features = timestep_features(clocks, TIMESTEP_FEATURES).to(dtype)  # (1 or 2, B, 256)
        if self.config.two_clocks:
            return self.t_embedder_sem(features[1]), self.t_embedder_tex(features[0])
        return self.t_embedder(features[0]), None

    def _recomputes(self, index: int) -> bool:
        share = self.checkpoint_activations
        return self.training and torch.is_grad_enabled() and round((index + 1) * share) > round(index * share)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, patch * patch * C), packed (row, column, channel) -> (B, C, grid, grid), contiguous."""
        config, batch = self.config, patches.shape[0]
        patch, side = config.patch_size, config.grid_size // config.patch_size
        pixels = patches.view(batch, side, side, patch, patch, config.channels)
        pixels = pixels.permute(0, 5, 1, 3, 2, 4)  # (B, C, side, patch, side, patch)
        return pixels.reshape(batch, config.channels, config.grid_size, config.grid_size).contiguous()


def _repa_head(config: ModelConfig) -> nn.Sequential:
    hidden = config.repa_hidden
    return nn.Sequential(
        Linear(config.hidden_size, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU(),
        Linear(hidden, config.repa_channels),
    )  # fmt: skip


def num_flops(config: ModelConfig, *, training: bool = False) -> int:
    """Floating-point operations per image: 2 per multiply-add of Linears, convolution and attention, nothing else.

    Forward pass without the REPA head, or with training=True three times forward and head (backward costs two).
    XL: 237.3e9 and 724e9.
    """
    width, tokens = config.hidden_size, config.num_tokens
    patch = config.patch_size**2 * config.channels * width
    clock = width // 2 if config.two_clocks else width
    num_clocks = 2 if config.two_clocks else 1
    condition = num_clocks * (TIMESTEP_FEATURES * clock + clock * clock)
    adaln = (6 if config.use_shift else 4) * width * width
    block = tokens * (4 * width * width + 3 * width * config.mlp_hidden) + 2 * tokens * tokens * width + adaln
    forward = config.depth * block + 2 * tokens * patch + 2 * width * width + condition
    if not training:
        return 2 * forward
    hidden = config.repa_hidden
    head = tokens * (width * hidden + hidden * hidden + hidden * config.repa_channels) if config.repa_channels else 0
    return 3 * 2 * (forward + head)
