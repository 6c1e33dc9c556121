"""SemVAE: compresses each token of vision features into a few Gaussian channels, and its loss.

B batch, N tokens, F feature channels, D width, H heads, C latent channels.
Parameter names are those of the released checkpoints (nn.MultiheadAttention's inside the transformer blocks).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from sfd_kernels import feature_alignment_loss, swiglu
from torch import Tensor, nn

from sfd_fast.config import SemVAEConfig
from sfd_fast.diffusion.posterior import LOGVAR_RANGE, sample_posterior
from sfd_fast.files.tensors import float32_by_default
from sfd_fast.models.attention import attention


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases under nn.MultiheadAttention's names: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        batch, num_tokens, width = h.shape
        qkv = F.linear(h, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, num_tokens, 3, self.num_heads, width // self.num_heads).unbind(2)
        return self.out_proj(attention(q, k, v).reshape(batch, num_tokens, width))


class TransformerBlock(nn.Module):
    """Pre-LN block: x += attention(norm1(x));  x += mlp(norm2(x)) with exact GELU."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ResidualBlock(nn.Module):
    """x += mlp(norm(x)) on each token alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class SwiGLULayer(nn.Module):
    """SiLU(gate(x)) * up(x), two Linears under the released names and one matrix product."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.gate = nn.Linear(inputs, outputs)
        self.up = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.gate.weight, self.up.weight])
        return swiglu(F.linear(x, weight, torch.cat([self.gate.bias, self.up.bias])))


class PCA(nn.Module):
    """Projection on the leading principal components and back: the baseline that has no training. Source: ReDi."""

    def __init__(self, config: SemVAEConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.feature_channels))
        self.register_buffer("components", torch.eye(config.latent_channels, config.feature_channels))
        self.register_buffer("scale", torch.ones(config.feature_channels))  # other than 1 in the authors' alone

    def project(self, features: Tensor) -> Tensor:
        return F.linear((features - self.mean) / self.scale, self.components)

    def reconstruct(self, latent: Tensor) -> Tensor:
        return F.linear(latent, self.components.t()) * self.scale + self.mean

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Components of the covariance over all tokens of all batches (..., F), exactly and in one pass.

        Each component's largest entry is positive, so equal data give equal components.
        Raises ValueError without data.
        """
        count, mean, scatter = 0, 0.0, 0.0
        for batch in batches:
            tokens = batch.reshape(-1, batch.shape[-1]).double()
            shift = tokens.mean(0) - mean  # merging of moments: Chan, Golub, LeVeque (1979)
            centred = tokens - tokens.mean(0)
            total = count + len(tokens)
            scatter = scatter + centred.t() @ centred + torch.outer(shift, shift) * (count * len(tokens) / total)
            mean = mean + shift * (len(tokens) / total)
            count = total
        if count == 0:
            raise ValueError("PCA needs features to fit; none were given")
        directions = torch.linalg.eigh(scatter).eigenvectors.t().flip(0)[: len(self.components)]
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.components.copy_(directions * largest.sign())
        self.mean.copy_(mean)


def _mlp(inputs: int, hidden: int, outputs: int, num_layers: int) -> list[nn.Module]:
    widths = [inputs] + [hidden] * (num_layers - 1)
    layers: list[nn.Module] = [SwiGLULayer(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return [*layers, nn.Linear(widths[-1], outputs)]


def _stack(config: SemVAEConfig, inputs: int, outputs: int, depth: int, *, encoder: bool) -> nn.Sequential:
    """Encoder or decoder; the resnet's MLP follows its blocks in the encoder and precedes them in the decoder."""
    width = config.hidden_size
    if config.architecture == "linear":
        return nn.Sequential(nn.Linear(inputs, outputs))
    if config.architecture == "mlp":
        return nn.Sequential(*_mlp(inputs, width, outputs, config.num_layers))
    if config.architecture == "transformer":
        blocks = [TransformerBlock(width, config.num_heads) for _ in range(depth)]
        return nn.Sequential(nn.Linear(inputs, width), *blocks, nn.LayerNorm(width), nn.Linear(width, outputs))
    blocks = [ResidualBlock(width) for _ in range(depth)]
    if encoder:
        return nn.Sequential(nn.Linear(inputs, width), *blocks, *_mlp(width, width, outputs, config.num_layers))
    return nn.Sequential(*_mlp(inputs, width, width, config.num_layers + 1)[:-1], *blocks, nn.Linear(width, outputs))


class SemVAE(nn.Module):
    """Encoder to [mean | logvar] of C channels a token, decoder back to the features. Source: docs/METHOD.md 2."""

    @float32_by_default()
    def __init__(self, config: SemVAEConfig) -> None:
        super().__init__()
        self.config = config
        channels, latents = config.feature_channels, config.latent_channels
        if config.architecture == "pca":
            self.pca = PCA(config)
        else:
            self.encoder = _stack(config, channels, 2 * latents, config.encoder_depth, encoder=True)
            self.decoder = _stack(config, latents, channels, config.decoder_depth, encoder=False)
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """PyTorch's defaults, as released: packed attention xavier-uniform, attention biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, SelfAttention):
                nn.init.xavier_uniform_(module.in_proj_weight)
                nn.init.zeros_(module.in_proj_bias)
                nn.init.zeros_(module.out_proj.bias)

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of every token: features (B, N, F) -> (mean, logvar), each (B, N, C), logvar clamped to [-30, 20].

        PCA has no variance: its logvar is -30.
        """
        self._check(features, self.config.feature_channels, "features")
        if self.config.architecture == "pca":
            mean = self.pca.project(features)
            return mean, torch.full_like(mean, LOGVAR_RANGE[0])
        mean, logvar = self.encoder(features).float().chunk(2, dim=-1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, latent: Tensor) -> Tensor:
        """Features of latents: (B, N, C) -> (B, N, F)."""
        self._check(latent, self.config.latent_channels, "latents")
        return self.pca.reconstruct(latent) if self.config.architecture == "pca" else self.decoder(latent)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from a posterior sample mean + std * noise (noise (B, N, C); None takes the mean).

        Returns (reconstruction (B, N, F), mean, logvar).
        """
        mean, logvar = self.encode(features)
        latent = mean if noise is None else sample_posterior(mean, logvar, noise)
        return self.decode(latent), mean, logvar

    def _check(self, values: Tensor, channels: int, what: str) -> None:
        if values.ndim != 3 or values.shape[-1] != channels:
            raise ValueError(f"{what} of shape {tuple(values.shape)} were given; this SemVAE takes (B, N, {channels})")


def semvae_loss(
    reconstruction: Tensor,
    features: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    kl_weight: float,
    cosine_axis: str = "features",
) -> tuple[Tensor, dict[str, Tensor]]:
    """MSE + (1 - mean token cosine) + kl_weight * KL, KL = 0.5 * sum over tokens and channels of
    mean^2 + exp(logvar) - 1 - logvar.

    reconstruction, features: (B, N, F); mean, logvar: (B, N, C).  Returns the mean over the batch of the sum, and the
    terms per sample {"mse", "cosine", "kl"}, each (B,), kl weighted.
    cosine_axis: features, the cosine of each token (paper); tokens, of each feature over the tokens (released script).
    Source: docs/METHOD.md 2.
    """
    mse, cosine = feature_alignment_loss(reconstruction, features)
    if cosine_axis == "tokens":
        cosine = 1 - F.cosine_similarity(reconstruction.float(), features.float(), dim=1).mean(1)
    terms = {"mse": mse, "cosine": cosine, "kl": kl_weight * kl_divergence(mean, logvar)}
    return sum(terms.values()).mean(), terms


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of N(mean, exp(logvar)) from N(0, 1), summed over tokens and channels: (B, N, C) twice -> (B,)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
