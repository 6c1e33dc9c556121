"""Clocks, stage masks, interpolation and training losses of semantics-first diffusion: pure functions.

Time 0 is noise, 1 is data; x_t = (1 - t) x_0 + t x_1 and the velocity is x_1 - x_0. Channels are [texture | semantic].
Letters: B batch, C channels, H height, W width, N tokens, F width of VFM features.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from sfd_kernels import feature_alignment_loss, flow_matching_loss, noise_latents, philox_normal
from torch import Tensor

from sfd_fast.config import ModelConfig, SFDConfig, TransportConfig
from sfd_fast.diffusion import random_numbers


def split_latents(x: Tensor, texture: int | ModelConfig) -> tuple[Tensor, Tensor]:
    """Texture and semantic channels of a composite latent: views of x.

    x: (B, C, H, W); texture: number of texture channels C_t, or the model's config.
    Returns (B, C_t, H, W) and (B, C - C_t, H, W).
    """
    count = texture if isinstance(texture, int) else texture.texture_channels
    return x[:, :count], x[:, count:]


def join_latents(texture: Tensor, semantic: Tensor) -> Tensor:
    """The composite latent [texture | semantic], the inverse of split_latents."""
    return torch.cat([texture, semantic], dim=1)


def clocks(tau: Tensor, delta_t: float) -> tuple[Tensor, Tensor]:
    """Texture and semantic time at global time tau.

    t_tex = max(tau - delta_t, 0),  t_sem = min(tau, 1).
    tau: (B,), in [0, 1 + delta_t].  Returns (t_tex, t_sem), each (B,), in [0, 1].
    Source: SFD (arXiv 2512.04926), asynchronous denoising.
    """
    return (tau - delta_t).clamp(0, 1), tau.clamp(0, 1)


def stage_mask(
    tau_start: float | Tensor, tau_end: float | Tensor, delta_t: float
) -> tuple[bool | Tensor, bool | Tensor]:
    """Which streams move during the interval [tau_start, tau_end]: (texture, semantic).

    Texture moves after delta_t and semantics move up to 1. The mask belongs to the whole interval, whose inside must
    not contain a border (delta_t or 1): decided at its midpoint, so rounding of the ends does not matter.
    Source: docs/METHOD.md 5, exact grid.
    """
    middle = 0.5 * (tau_start + tau_end)
    return middle > delta_t, middle < 1.0


def evaluation_mask(tau: float | Tensor, delta_t: float | Tensor) -> tuple[bool | Tensor, bool | Tensor]:
    """Which streams the released sampler moves at an evaluation at time tau: (tau >= delta_t, tau <= 1).

    With delta_t = 0 there is no mask, also not past the end, where dopri5 evaluates.
    Source: docs/METHOD.md 5, released grid; a step that straddles a border mixes masks.
    """
    if delta_t == 0:
        return True, True
    return tau >= delta_t, tau <= 1


def released_clocks(tau: Tensor, delta_t: float) -> tuple[Tensor, Tensor]:
    """Texture and semantic time at which the released sampler evaluates the network: clocks(), but without an end for
    texture.

    Only dopri5 evaluates past tau = 1 + delta_t, where its texture clock goes on to 1.06 and more.
    tau: (B,).  Returns (t_tex, t_sem), each (B,).  Source: docs/METHOD.md 5, released grid.
    """
    return (tau - delta_t).clamp(min=0), tau.clamp(0, 1)


def sample_tau(sample_ids: Tensor, config: TransportConfig, seed: int) -> Tensor:
    """Training times tau = (1 + delta_t) u, a function of (seed, sample id) alone.

    u is uniform on (0, 1) or the logistic function of a standard normal (logit-normal).
    sample_ids: (B,) int64.  Returns (B,) float32 in [0, 1 + delta_t].
    Source: paper (uniform) and released configurations (logit-normal), docs/METHOD.md 4.
    """
    if config.time_distribution == "uniform":
        u = random_numbers.uniform(sample_ids, seed=seed, stream=random_numbers.TRAIN_TIME)[:, 0]
    else:
        u = torch.sigmoid(philox_normal(sample_ids, seed, random_numbers.TRAIN_TIME, 1)[:, 0].double())
    return ((1 + config.delta_t) * u).float()


def noise(sample_ids: Tensor, shape: Sequence[int], seed: int, stream: int) -> Tensor:
    """Standard normals as a function of (seed, sample id): nothing depends on the batch.

    sample_ids: (B,) int64; shape: of one sample; stream: a number of random_numbers.py.  Returns (B, *shape) float32.
    """
    return philox_normal(sample_ids, seed, stream, math.prod(shape)).view(-1, *shape)


def drop_labels(labels: Tensor, sample_ids: Tensor, *, probability: float, num_classes: int, seed: int) -> Tensor:
    """Labels, replaced by the null class num_classes with the given probability (for classifier-free guidance).

    labels, sample_ids: (B,) of any integers.  Returns (B,) int64.
    """
    labels = labels.long()
    if probability == 0:
        return labels
    dropped = random_numbers.uniform(sample_ids, seed=seed, stream=random_numbers.LABEL_DROPOUT)[:, 0] < probability
    return torch.where(dropped, num_classes, labels)


def feature_tokens(features: Tensor) -> Tensor:
    """A map as tokens, row by row: (B, F, h, w) becomes (B, h * w, F); (B, N, F) stays."""
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def feature_map(tokens: Tensor) -> Tensor:
    """The inverse on a square grid: (B, N, F) becomes (B, F, h, w), a view."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def repa_loss(prediction: Tensor, target: Tensor, config: TransportConfig) -> Tensor:
    """Representation alignment per sample: repa_weight times the mean over tokens of the mode's distance.

    cos: 1 - cos(prediction, target);  mse: mean squared error;  cos_mse: half the sum of both.
    prediction: (B, N, F); target: (B, N, F), or (B, F, h, w).  Returns (B,) float32.
    Raises ValueError where the shapes differ. Source: REPA (arXiv 2410.06940), docs/METHOD.md 4.
    """
    target = feature_tokens(target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"REPA compares predictions {tuple(prediction.shape)} with VFM features {tuple(target.shape)} (samples, "
            "tokens, width): set model.repa_channels to the VFM's width and use features on the latent's token grid, "
            "or set transport.repa_weight to 0"
        )
    mse, cosine = feature_alignment_loss(prediction, target)
    distance = {"cos": cosine, "mse": mse, "cos_mse": 0.5 * (cosine + mse)}[config.repa_mode]
    return config.repa_weight * distance


def loss(
    model: Callable,
    x1: Tensor,
    x0: Tensor,
    tau: Tensor,
    labels: Tensor,
    *,
    config: TransportConfig,
    num_texture_channels: int,
    features: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Training loss at given noise and times: every switched-on term, each independent of the others.

    velocity = mean over channels and positions of w_c (v_hat - v)^2, w = 1 for texture, semantic_weight for semantics;
    cosine = mean over positions of 1 - cos(v_hat, v) along channels;  repa as in repa_loss.
    Clamped streams contribute as the others do.

    model(x, t_tex, t_sem, labels[, return_features=True]); x1, x0: (B, C, H, W) data and noise; tau: (B,); labels:
    (B,), dropped already; features: (B, N, F) or (B, F, h, w) from the VFM, needed where repa_weight > 0.
    Returns the mean over the batch of the sum of the terms, and the terms per sample {"velocity", "cosine", "repa"},
    each (B,) float32, with gradients; a term that is switched off is absent.
    Raises ValueError where REPA is on and there are no features. Source: docs/METHOD.md 4.
    """
    with_repa = config.repa_weight > 0
    if with_repa and features is None:
        raise ValueError(
            f"transport.repa_weight is {config.repa_weight} but the batch has no VFM features: write them into the "
            "latent shards (feats_dino), or set transport.repa_weight to 0"
        )
    t_tex, t_sem = clocks(tau, config.delta_t)
    x_t = noise_latents(x1, x0, t_tex, t_sem, num_texture_channels)
    if with_repa:
        prediction, hidden = model(x_t, t_tex, t_sem, labels, return_features=True)
    else:
        prediction = model(x_t, t_tex, t_sem, labels)
    velocity, cosine = flow_matching_loss(prediction, x0, x1, num_texture_channels, config.semantic_weight)
    terms = {}
    if config.velocity_loss:
        terms["velocity"] = velocity
    if config.cosine_loss:
        terms["cosine"] = cosine
    if with_repa:
        terms["repa"] = repa_loss(hidden, features, config)
    return sum(terms.values()).mean(), terms


def training_loss(
    model: Callable, batch: Mapping[str, Tensor], config: SFDConfig, *, seed: int, drop: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch, all its randomness drawn from (seed, sample id).

    batch: latents (B, C, H, W) normalised composite, labels (B,) int64, sample_ids (B,) int64 (position in the run, so
    each visit of a sample draws anew), and features where REPA is on. drop=False keeps all labels (validation).
    Returns as loss does: the scalar to differentiate, and the terms per sample.
    """
    latents, sample_ids = batch["latents"], batch["sample_ids"].long()
    labels = drop_labels(
        batch["labels"],
        sample_ids,
        probability=config.model.class_dropout if drop else 0.0,
        num_classes=config.model.num_classes,
        seed=seed,
    )
    return loss(
        model,
        latents,
        noise(sample_ids, latents.shape[1:], seed, random_numbers.TRAIN_NOISE).to(latents.dtype),
        sample_tau(sample_ids, config.transport, seed),
        labels,
        config=config.transport,
        num_texture_channels=config.model.texture_channels,
        features=batch.get("features"),
    )
