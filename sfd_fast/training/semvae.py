"""SemVAE as a training job, and `run_train_semvae`.

Letters: B batch, N tokens, F channels of a feature, C latent channels.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sfd_fast.config import SemVAETrainingConfig, TrainConfig, overlaid, require
from sfd_fast.data.load.features import FeatureLoader, FeatureShards
from sfd_fast.data.load.held_out import SPREAD
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.transport import noise
from sfd_fast.files.digest import tensors_digest
from sfd_fast.formats.model_folder import save_model
from sfd_fast.models.semvae import SemVAE, semvae_loss
from sfd_fast.training.engines.interface import Batch, Engine
from sfd_fast.training.held_out import VALIDATION_IDS, held_out_means
from sfd_fast.training.job import Job, a_few, check_default_dtype
from sfd_fast.training.loop import TrainResult, build_engine, run_job
from sfd_fast.training.precision import settled
from sfd_fast.training.run.directory import MODEL, lock, prepare_directory

TERMS = ("mse", "cosine", "kl")
EPOCHS, LEAST_STEPS, MOST_STEPS = 50, 2_000, 1_000_000
"""the length where train.max_steps is 0: on ImageNet the released million of batches of 64, which are 50 epochs"""


def semvae_terms(network: nn.Module, batch: Batch, config: SemVAETrainingConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss MSE + (1 - cosine) + kl_weight * KL at s = mean + std * eps, eps from (seed, sample id); docs/METHOD.md 2.

    batch: features (B, N, F), sample_ids (B,).  Returns the scalar and the terms per sample, kl weighted.
    """
    features, ids = batch["features"], batch["sample_ids"]
    shape = (features.shape[1], config.semvae.latent_channels)
    eps = noise(ids, shape, config.train.seed, random_numbers.SEMVAE_NOISE)
    reconstruction, mean, logvar = network(features, eps)
    weights = {"kl_weight": config.semvae.kl_weight, "cosine_axis": config.semvae.cosine_axis}
    return semvae_loss(reconstruction, features, mean, logvar, **weights)


def validation_loss(engine: Engine, config: SemVAETrainingConfig, shards: FeatureShards) -> dict[str, float]:
    """Mean loss terms over held-out features."""

    def batch_of(indices: Tensor) -> Batch:
        features = shards.gather(indices, torch.zeros(len(indices), dtype=torch.bool))
        batch = {"features": features, "sample_ids": indices + VALIDATION_IDS}
        return {name: value.to(engine.device) for name, value in batch.items()}

    objective = partial(semvae_terms, config=config)
    with engine.eval_mode():
        return held_out_means(engine, TERMS, len(shards), config.train.global_batch_size, batch_of, objective)


def save_semvae(folder: Path, model: SemVAE, step: int) -> None:
    save_model(folder, model, card={"step": step})


def load_features(config: SemVAETrainingConfig) -> tuple[FeatureShards, FeatureShards | None]:
    """(training set, held-out set or None); ValueError where they do not fit the model."""
    data = config.data
    require(bool(data.path), "data.path is empty; give the folder of feature shards (`sfd features` makes them)")
    shards = FeatureShards(data.path, cache_folder=data.cache_folder)
    require(
        shards.channels == config.semvae.feature_channels,
        f"{data.path} has features of {shards.channels} channels, semvae.feature_channels is "
        f"{config.semvae.feature_channels}: set it to {shards.channels}",
    )
    return shards.divide(data.validation_samples)


def with_length(config: SemVAETrainingConfig, num_samples: int) -> SemVAETrainingConfig:
    """config with as many steps as the data ask for where train.max_steps is 0; the schedule shrinks in proportion."""
    if config.train.max_steps:
        return config
    steps = math.ceil(EPOCHS * num_samples / config.train.global_batch_size)
    steps = min(max(steps, LEAST_STEPS), MOST_STEPS)
    shorter = {name: getattr(config.optimizer, name) * steps // MOST_STEPS for name in ("warmup_steps", "decay_start")}
    return overlaid(config, {"train.max_steps": steps, "optimizer": shorter})


def semvae_job(config: SemVAETrainingConfig) -> Job:
    """The job of training config.semvae on config.data."""
    check_default_dtype()
    config = settled(config)
    shards, held_out = load_features(config)
    config = with_length(config, len(shards))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = SemVAE(config.semvae)

    flip = config.data.flip and shards.says_flips()
    data = partial(FeatureLoader, shards, config.train.global_batch_size, config.train.seed, flip=flip)

    def batches(start_step: int, engine: Engine) -> Iterator[Batch]:
        return iter(data(engine.rank, engine.world_size, start_step, device=engine.device))

    def export(folder: Path, state: dict[str, Tensor], step: int) -> None:
        averaged = SemVAE(config.semvae)
        averaged.load_state_dict(state)
        save_semvae(folder, averaged, step)

    return Job(
        config=config,
        model=model,
        objective=partial(semvae_terms, config=config),
        terms=TERMS,
        batches=batches,
        export=export,
        evaluate=None if held_out is None else lambda engine: validation_loss(engine, config, held_out),
        flaw=data().flaw,
        identity={"num_samples": len(shards)} | ({} if held_out is None else {"held_out": SPREAD}),
        fingerprint=tensors_digest({"features": shards.gather(*a_few(len(shards)))}),
        num_samples=len(shards),
    )


def check_used(config: SemVAETrainingConfig) -> None:
    """Raises ValueError for settings of the diffusion transformer that SemVAE's training would pass over."""
    diffusion = ("checkpoint_activations", "residual", "attention", "init_from", "init_classes")
    plain = TrainConfig()
    given = {f"train.{name}": getattr(config.train, name) for name in diffusion}
    default = {f"train.{name}": getattr(plain, name) for name in diffusion}
    for key, value in (given | {"run.eval_every": config.run.eval_every}).items():
        require(
            value == default.get(key, 0),
            f"{key} {value!r} is a setting of the diffusion transformer, which SemVAE has not: leave it out",
        )


def fit_pca(config: SemVAETrainingConfig) -> TrainResult:
    """PCA has nothing to train: one exact pass over the training features."""
    shards, _ = load_features(config)
    folder = Path(config.run.out)
    with lock(folder):
        prepare_directory(folder, config, resume=True, write=True)
        model = SemVAE(config.semvae)
        size = config.train.global_batch_size
        plain = torch.zeros(size, dtype=torch.bool)
        starts = range(0, len(shards), size)
        chunks = (torch.arange(start, min(start + size, len(shards))) for start in starts)
        model.pca.fit(shards.gather(indices, plain[: len(indices)]) for indices in chunks)
        save_semvae(folder / MODEL, model, 0)
    return TrainResult(folder, 0, folder / MODEL)


def run_train_semvae(
    config: SemVAETrainingConfig,
    *,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Trains SemVAE on shards of VFM features, which are streamed; resumes as run_train does.

    The exported model holds the averaged weights; the default ema_decay 0 makes them the last ones, as released.
    Raises as run_job does, and ValueError where features and model do not fit, or for a setting of the transformer's.
    """
    check_used(config)
    if config.semvae.architecture == "pca":
        return fit_pca(config)
    config = settled(config, device)
    job = semvae_job(config)
    return run_job(job, build_engine(job, device), resume=resume, progress=progress)
