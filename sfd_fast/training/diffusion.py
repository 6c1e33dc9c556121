"""The diffusion transformer as a training job, and `run_train`: latent shards, held-out loss, sample grids, export.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sfd_fast.config import SFDConfig, require
from sfd_fast.data.cache.describe import CacheSizes, describe
from sfd_fast.data.load.held_out import SPREAD
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.data.load.loader import LatentLoader
from sfd_fast.data.load.targets import Targets, open_targets, with_targets
from sfd_fast.diffusion.posterior import add_posterior_noise
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.diffusion.transport import sample_tau, training_loss
from sfd_fast.files.digest import tensors_digest
from sfd_fast.formats.model_folder import CARD, save_model
from sfd_fast.formats.released_model import load_model
from sfd_fast.models.dit import LightningDiT, num_flops
from sfd_fast.sampling.pipeline_folder import folder_of_model
from sfd_fast.training.engines.interface import Batch, Engine
from sfd_fast.training.held_out import VALIDATION_IDS, held_out_means
from sfd_fast.training.job import Job, a_few, check_default_dtype
from sfd_fast.training.loop import TrainResult, build_engine, run_job
from sfd_fast.training.precision import settled
from sfd_fast.training.run.drawing import UNGUIDED, Quality, check_drawing, sample_picture, texture_decoder

CLOCK_BINS = 10
UNUSED_TARGETS = "transport.repa_weight is 0: data.targets is not used"


def split_held_out(config: SFDConfig) -> tuple[LatentShards, LatentShards | None]:
    """(training set, held-out set or None): data.validation_path, or data.validation_samples spread over data.path."""
    data = config.data
    require(bool(data.path), "data.path is empty; give the folder of latent shards (`sfd encode` makes them)")
    options = {"cache_folder": data.cache_folder, "semantic_channels": config.model.semantic_channels}
    shards = LatentShards(data.path, **options)
    if data.validation_path:
        return shards, LatentShards(data.validation_path, **options)
    return shards.divide(data.validation_samples)


def targets_of(
    config: SFDConfig, shards: LatentShards, held_out: LatentShards | None, statistics: LatentStatistics
) -> tuple[Targets | None, Targets | None]:
    """What computes REPA's targets of (training, held-out) data; None where they are stored or REPA is off.

    Raises ValueError where they do not belong to the cache.
    """
    data = config.data
    if config.transport.repa_weight == 0:
        return None, None
    parts = {"semvae": data.semvae, "vfm": data.vfm, "num_threads": max(1, data.num_workers)}
    training = open_targets(data.targets, shards, statistics, images=data.images, **parts)
    if held_out is None or held_out.folder == shards.folder:
        return training, training
    return training, open_targets(data.targets, held_out, statistics, **parts)


def check_data(config: SFDConfig, shards: LatentShards, targets: Targets | None) -> None:
    """Raises ValueError where the shards do not fit the model or the losses."""
    model = config.model
    for stream in ("texture", "semantic"):
        have, want = getattr(shards, f"{stream}_channels"), getattr(model, f"{stream}_channels")
        require(
            have == want,
            f"{config.data.path} has {have} {stream} channels, model.{stream}_channels is {want}: set it to {have}",
        )
    grid = (model.grid_size, model.grid_size)
    require(
        tuple(shards.grid) == grid,
        f"{config.data.path} has latents of {shards.grid[0]} x {shards.grid[1]}, model.grid_size is {model.grid_size}",
    )
    if config.transport.repa_weight > 0:
        grid = shards.feature_shape
        tokens, width = (grid[1] * grid[2], grid[0]) if targets is None else targets.shape
        require(
            (tokens, width) == (model.num_tokens, model.repa_channels),
            f"VFM features of {config.data.path} ({config.data.targets}) are {tokens} tokens of width {width}; the "
            f"REPA head predicts model.repa_channels = {model.repa_channels} on {model.num_tokens} tokens",
        )
    labels = shards.max_label
    require(
        labels < model.num_classes,
        f"{config.data.path} has label {labels}, but model.num_classes is {model.num_classes} (labels 0 to "
        f"{model.num_classes - 1})",
    )


def term_names(config: SFDConfig) -> tuple[str, ...]:
    on = {
        "repa": config.transport.repa_weight > 0,
        "velocity": config.transport.velocity_loss,
        "cosine": config.transport.cosine_loss,
    }
    return tuple(name for name, switched_on in on.items() if switched_on)


def latent_statistics(config: SFDConfig, shards: LatentShards) -> LatentStatistics:
    """What the latents are standardised by: the cache's statistics, or 0 and 1 where data.normalise_* is off."""
    data = config.data
    if not (data.normalise_texture or data.normalise_semantic):
        plain = LatentStatistics.identity(shards.texture_channels, shards.semantic_channels)
        return replace(plain, multiplier=data.latent_multiplier)
    statistics = shards.statistics(data.latent_multiplier)
    return statistics.standardising(texture=data.normalise_texture, semantic=data.normalise_semantic)


def initial_model(config: SFDConfig) -> LightningDiT:
    """The network at step 0: from train.init_from, or random as a function of train.seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = LightningDiT(
            config.model,
            residual=config.train.residual,
            attention_backend=config.train.attention,
            checkpoint_activations=config.train.checkpoint_activations,
        )
    if config.train.init_from:
        load_initial_weights(model, config)
    return model


def load_initial_weights(model: LightningDiT, config: SFDConfig) -> None:
    """Fine-tuning: copies the weights of train.init_from. ValueError names what does not fit."""
    path = Path(config.train.init_from)
    if path.is_dir():  # a run directory stands for its model, a pipeline for its network
        path = folder_of_model(path)
        path = path / "transformer" if (path / "transformer").is_dir() else path
    given, wanted = load_model(path).state_dict(), model.state_dict()
    table = "y_embedder.embedding_table.weight"
    if config.train.init_classes == "new" and given[table].shape[1:] == wanted[table].shape[1:]:
        # the null class, the last row, means the same in both
        null = given[table][-1:] if model.config.class_dropout > 0 else given[table][:0]
        given[table] = torch.cat([wanted[table][: model.config.num_classes], null])
    different = [k for k in wanted if k not in given or given[k].shape != wanted[k].shape]
    different += [k for k in given if k not in wanted]
    if different:
        key = different[0]
        shapes = [tuple(s[key].shape) if key in s else "absent" for s in (given, wanted)]
        raise ValueError(
            f"weights in train.init_from {path} do not fit the model: {len(different)} tensors differ, the first is "
            f"{key} ({shapes[0]} there, {shapes[1]} here); choose the model that the weights were trained with"
            + ("; train.init_classes 'new' starts the label table anew" if different == [table] else "")
        )
    model.load_state_dict(given)


def validation_loss(
    engine: Engine,
    config: SFDConfig,
    shards: LatentShards,
    statistics: LatentStatistics,
    targets: Targets | None = None,
) -> dict[str, float]:
    """Mean loss terms over held-out data, labels kept: raw weights, and `_ema` averaged ones."""

    def mean_terms() -> dict[str, float]:
        return held_out_means(
            engine, term_names(config), len(shards), config.train.global_batch_size,
            lambda indices: held_out_batch(engine, config, shards, statistics, indices, targets),
            partial(training_loss, config=config, seed=config.train.seed, drop=False),
        )  # fmt: skip

    with engine.eval_mode():
        figures = mean_terms()
        with engine.ema_weights():
            figures |= {f"{name}_ema": value for name, value in mean_terms().items()}
    return figures


def held_out_batch(
    engine: Engine,
    config: SFDConfig,
    shards: LatentShards,
    statistics: LatentStatistics,
    indices: Tensor,
    targets: Targets | None,
) -> Batch:
    """Unflipped held-out samples as training sees them: normalised, moments sampled at fixed noise, with features."""
    plain = torch.zeros(len(indices), dtype=torch.bool)
    stored = config.transport.repa_weight > 0 and targets is None
    raw = {k: v.to(engine.device) for k, v in shards.gather(indices, plain, features=stored).items()}
    latents = statistics.normalize(raw["texture"], raw["semantic"])
    ids = (indices + VALIDATION_IDS).to(engine.device)
    if "texture_logvar" in raw:
        scale, _ = statistics.scale_and_shift()
        add_posterior_noise(latents, raw["texture_logvar"], ids, config.train.seed, scale.to(engine.device))
    batch = {"latents": latents, "labels": raw["labels"], "sample_ids": ids}
    if targets is not None:
        with engine.autocast():
            batch["features"] = targets.to(engine.device)(latents, shards.numbers(indices), plain)
    elif stored:
        batch["features"] = raw["features"]
    return batch


def clock_bins(batch: Batch, config: SFDConfig) -> Tensor:
    """Which of CLOCK_BINS equal parts of [0, 1 + delta_t] each sample's time lies in: (B,) int64."""
    share = sample_tau(batch["sample_ids"], config.transport, config.train.seed) / (1 + config.transport.delta_t)
    return (share * CLOCK_BINS).long().clamp(0, CLOCK_BINS - 1)


def save_averaged(
    folder: Path,
    state: dict[str, Tensor],
    step: int,
    *,
    config: SFDConfig,
    statistics: LatentStatistics,
    card: Mapping[str, object],
) -> None:
    with torch.device("meta"):
        averaged = LightningDiT(config.model)
    averaged.load_state_dict(state, assign=True)
    save_model(folder, averaged, statistics=statistics, config=config, card={"step": step, **card})


def card_of(cache: CacheSizes, num_classes: int) -> dict[str, object]:
    """What a model tells of the data it was trained on, for whoever samples it: see CARD."""
    names = {str(i): name for i, name in enumerate(cache.class_names or ()) if i < num_classes}
    return dict(zip(CARD, (cache.trained_classes, names or None, cache.texture_codec), strict=True))


def identity_of(
    config: SFDConfig, shards: LatentShards, statistics: LatentStatistics, targets: Targets | None
) -> dict[str, object]:
    """What a resumed run must find again of its data."""
    identity = {"num_samples": len(shards), "statistics": statistics.digest()}
    if config.data.validation_samples and not config.data.validation_path:
        identity["held_out"] = SPREAD
    if targets is not None:
        identity["target_weights"] = targets.fingerprint[:16]
    return identity


def notes_of(config: SFDConfig, num_trained: int) -> tuple[str, ...]:
    """What a user should know of this run, one line each. num_trained: classes that the data have images of."""
    drawn = config.run.sample_every > 0 or config.run.eval_every > 0
    num_classes = config.model.num_classes
    untrained = (
        f"model.num_classes is {num_classes}, but {config.data.path} has images of {num_trained} classes: "
        f"{num_classes - num_trained} are never trained, and what is drawn of them means nothing"
    )
    said = {
        UNGUIDED: drawn and config.guidance.mode == "autoguidance" and config.guidance.active,
        UNUSED_TARGETS: config.data.targets != "stored" and config.transport.repa_weight == 0,
        untrained: num_classes > num_trained,
    }
    return tuple(note for note, applies in said.items() if applies)


def diffusion_job(config: SFDConfig, *, decode: Callable[[Tensor], Tensor] | None = None) -> Job:
    """The job of training config.model on config.data.

    Raises ValueError where data, model and losses do not fit together.
    """
    check_default_dtype()
    config = settled(config)
    shards, held_out = split_held_out(config)
    statistics = latent_statistics(config, shards)
    targets, held_out_targets = targets_of(config, shards, held_out, statistics)
    check_data(config, shards, targets)
    cache = describe(config.data.path, config.data.cache_folder)
    classes, card = cache.trained_classes, card_of(cache, config.model.num_classes)
    model = initial_model(config)
    data = partial(
        LatentLoader,
        shards,
        config.train.global_batch_size,
        config.train.seed,
        statistics=statistics,
        flip=config.data.flip and shards.says_flips(),
        features=config.transport.repa_weight > 0 and targets is None,
        num_workers=config.data.num_workers,
    )

    def batches(start_step: int, engine: Engine) -> Iterator[Batch]:
        loader = data(engine.rank, engine.world_size, start_step, device=engine.device)
        return with_targets(loader, targets and targets.to(engine.device), engine.autocast)

    check_drawing(config, decoded=decode is not None or bool(config.data.texture_codec))
    decode = decode or texture_decoder(config)
    validate = partial(
        validation_loss, config=config, shards=held_out, statistics=statistics, targets=held_out_targets
    )
    drawn = {"config": config, "statistics": statistics, "decode": decode}
    return Job(
        config=config,
        model=model,
        objective=partial(training_loss, config=config, seed=config.train.seed),
        terms=term_names(config),
        batches=batches,
        export=partial(save_averaged, config=config, statistics=statistics, card=card),
        evaluate=None if held_out is None else validate,
        flaw=data().flaw,
        samples=partial(sample_picture, **drawn),
        quality=partial(Quality, **drawn) if config.run.eval_every else None,
        bins=partial(clock_bins, config=config),
        num_bins=CLOCK_BINS,
        identity=identity_of(config, shards, statistics, targets),
        fingerprint=tensors_digest(shards.gather(*a_few(len(shards)), features=False)),
        record={"statistics": statistics.to_json(), **card},
        num_samples=len(shards),
        flops_per_sample=num_flops(model.config, training=True),
        notes=notes_of(config, shards.max_label + 1 if classes is None else len(classes)),
    )


def run_train(
    config: SFDConfig,
    *,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = True,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> TrainResult:
    """Trains the two-clock diffusion transformer on latent shards; a killed run goes on from its last checkpoint.

    config.data.path: folder of shards with their statistics; config.run.out: run directory. decode: texture latents
    (B, C_t, h, w) -> images (B, 1 or 3, H, W) in [-1, 1] for sample grids (None: data.texture_codec, or the channels
    themselves). progress=False shows no bar.
    Raises as run_job does, and ValueError where model, data and transport contradict each other.
    """
    config = settled(config, device)
    job = diffusion_job(config, decode=decode)
    return run_job(job, build_engine(job, device), resume=resume, progress=progress)
