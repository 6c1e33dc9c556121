"""The diffusion transformer as a training job: latent shards, held-out loss, sample grids, export.

Letters: B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sfd_fast import streams
from sfd_fast.config import SFDConfig, require
from sfd_fast.data.latents import LatentLoader, LatentShards
from sfd_fast.data.statistics import LatentStatistics
from sfd_fast.guidance import bind_labels, bind_null, cfg
from sfd_fast.models.dit import LightningDiT
from sfd_fast.sampler import sample
from sfd_fast.training.engine import Batch, Engine
from sfd_fast.training.job import Job
from sfd_fast.transport import noise, sample_tau, split_latents, training_loss

VALIDATION_IDS = 2**40
"""first sample id of held-out data: no position of a run comes near it, so its noise and times are its own and fixed"""
CLOCK_BINS = 10
FREE_TRAIN_KEYS = frozenset(
    f"train.{key}"
    for key in (
        "out", "max_steps", "micro_batch_size", "compile", "checkpoint_activations", "attention", "log_every",
        "validate_every", "sample_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps", "spike_factor",
        "init_from", "init_classes", "engine", "num_sample_images", "tensorboard", "dry_run", "peak_tflops",
        "profile_steps", "profile_start", "nvtx",
    )
)  # fmt: skip
FREE_KEYS = FREE_TRAIN_KEYS | {
    "data.path", "data.validation_path", "data.num_workers", "data.texture_codec", "sampler.*", "guidance.*",
    "deepspeed.*",
}  # fmt: skip
"""what may differ between a run and its continuation"""


def split_held_out(config: SFDConfig) -> tuple[LatentShards, LatentShards | None]:
    """(training set, held-out set or None): data.validation_path, or the last data.validation_samples of data.path."""
    data = config.data
    require(bool(data.path), "data.path is empty; give the folder of latent shards (`sfd encode` makes them)")
    shards = LatentShards(data.path)
    if data.validation_path:
        return shards, LatentShards(data.validation_path)
    require(
        data.validation_samples < len(shards),
        f"data.validation_samples {data.validation_samples} leaves nothing of the {len(shards)} samples to train on",
    )
    if data.validation_samples == 0:
        return shards, None
    border = len(shards) - data.validation_samples
    return shards.slice(0, border), shards.slice(border, len(shards))


def check_data(config: SFDConfig, shards: LatentShards) -> None:
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
        shape = shards.feature_shape
        require(
            shape is not None,
            f"{config.data.path} has no VFM features (feats_dino), which REPA needs; encode them, or set "
            "transport.repa_weight to 0",
        )
        require(
            shape[0] == model.repa_channels and shape[1] * shape[2] == model.num_tokens,
            f"VFM features of {config.data.path} have shape {tuple(shape)}; the REPA head predicts "
            f"model.repa_channels = {model.repa_channels} on {model.num_tokens} tokens",
        )
    labels = max(int(part.max()) for part in shards._labels)
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
    from sfd_fast.checkpoint import load_model

    path = Path(config.train.init_from)
    given, wanted = load_model(path).state_dict(), model.state_dict()
    table = "y_embedder.embedding_table.weight"
    if config.train.init_classes == "new" and given[table].shape[1:] == wanted[table].shape[1:]:
        # the null class, the last row, means the same in both
        given[table] = torch.cat([wanted[table][:-1], given[table][-1:]])
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
    engine: Engine, config: SFDConfig, shards: LatentShards, statistics: LatentStatistics
) -> dict[str, float]:
    """Mean loss terms over held-out data at fixed noise and times, labels kept: raw weights, and `_ema` averaged ones.

    Every rank takes an equal share; repeated samples that fill up the last batch do not count.
    """
    size = max(1, min(config.train.global_batch_size // engine.world_size, len(shards)))
    names = term_names(config)

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return training_loss(model, batch, config, seed=config.train.seed, drop=False)

    def mean_terms() -> dict[str, float]:
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=engine.device)
        stride = size * engine.world_size
        for start in range(engine.rank * size, -(-len(shards) // stride) * stride, stride):
            ids = torch.arange(start, start + size)
            batch = held_out_batch(shards, statistics, ids % len(shards), engine.device)
            terms = engine.evaluate(batch, objective)
            counts = (ids < len(shards)).to(engine.device)
            sums += torch.stack([*((terms[n] * counts).sum() for n in names), counts.sum()]).double()
        *totals, count = engine.sum_over_ranks(sums).tolist()
        means = {name: total / count for name, total in zip(names, totals)}
        return {"loss": sum(means.values())} | means

    with engine.eval_mode():
        figures = mean_terms()
        with engine.ema_weights():
            figures |= {f"{name}_ema": value for name, value in mean_terms().items()}
    return figures


def held_out_batch(shards: LatentShards, statistics: LatentStatistics, indices: Tensor, device: torch.device) -> Batch:
    raw = shards.gather(indices, torch.zeros(len(indices), dtype=torch.bool))
    batch = {
        "latents": statistics.normalize(raw["texture"], raw["semantic"]),
        "labels": raw["labels"],
        "sample_ids": indices + VALIDATION_IDS,
    }
    if "features" in raw:
        batch["features"] = raw["features"]
    return {name: value.to(device) for name, value in batch.items()}


def sample_picture(
    engine: Engine, config: SFDConfig, statistics: LatentStatistics, decode: Callable[[Tensor], Tensor]
) -> Tensor:
    """A grid of images of the classes in turn, from fixed noise, with the averaged weights: (3, H, W) uint8.

    Guided as config.guidance says where that is cfg; AutoGuidance needs a second model and is left to `sfd sample`.
    """
    model_config = config.model
    ids = torch.arange(config.train.num_sample_images, device=engine.device)
    labels = ids % model_config.num_classes
    shape = (model_config.channels, model_config.grid_size, model_config.grid_size)
    x0 = noise(ids, shape, config.train.seed, streams.SAMPLE_NOISE)
    with engine.eval_mode(), engine.ema_weights() as model, engine.autocast(), torch.no_grad():
        velocity = bind_labels(model, labels)
        if config.guidance.mode == "cfg":
            null = bind_null(model, labels, model_config.num_classes)
            velocity = cfg(
                velocity, null, config.guidance, num_texture_channels=model_config.texture_channels,
                delta_t=config.transport.delta_t,
            )  # fmt: skip
        latents = sample(
            velocity, x0, delta_t=config.transport.delta_t, config=config.sampler,
            num_texture_channels=model_config.texture_channels,
        )  # fmt: skip
    texture, _ = split_latents(latents, model_config)
    with torch.no_grad():
        images = decode(statistics.denormalize_texture(texture.float())).float().cpu()
    return picture_grid(images)


def picture_grid(images: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) in [-1, 1] as one picture (3, rows * H, columns * W) uint8, about square."""
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    count, _, height, width = images.shape
    columns = max(1, round(count**0.5))
    rows = -(-count // columns)
    canvas = torch.full((rows * columns, 3, height, width), -1.0)
    canvas[:count] = images
    canvas = canvas.view(rows, columns, 3, height, width).permute(2, 0, 3, 1, 4).reshape(3, rows * height, -1)
    return (127.5 * canvas + 128).clamp(0, 255).to(torch.uint8)  # METHOD 2


def texture_decoder(config: SFDConfig) -> Callable[[Tensor], Tensor]:
    """What turns texture latents into images for sample grids."""
    if not config.data.texture_codec:
        return lambda texture: texture
    from sfd_fast.models.texture import load_texture_codec

    codec = load_texture_codec(config.data.texture_codec)
    return lambda texture: codec.to(texture.device).decode(texture)


def diffusion_job(config: SFDConfig, *, decode: Callable[[Tensor], Tensor] | None = None) -> Job:
    """The job of training config.model on config.data.

    Raises ValueError where data, model and losses do not fit together.
    """
    shards, held_out = split_held_out(config)
    check_data(config, shards)
    statistics = shards.statistics(config.data.latent_multiplier)
    model = initial_model(config)
    seed = config.train.seed

    def objective(network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return training_loss(network, batch, config, seed=seed)

    def batches(start_step: int, engine: Engine) -> Iterator[Batch]:
        return iter(
            LatentLoader(
                shards,
                config.train.global_batch_size,
                seed,
                engine.rank,
                engine.world_size,
                start_step,
                statistics=statistics,
                flip=config.data.flip,
                features=config.transport.repa_weight > 0,
                num_workers=config.data.num_workers,
                device=engine.device,
            )
        )

    def bins(batch: Batch) -> Tensor:
        share = sample_tau(batch["sample_ids"], config.transport, seed) / (1 + config.transport.delta_t)
        return (share * CLOCK_BINS).long().clamp(0, CLOCK_BINS - 1)

    def export(folder: Path, state: dict[str, Tensor], step: int) -> None:
        from sfd_fast.checkpoint import save_model

        with torch.device("meta"):
            averaged = LightningDiT(config.model)
        averaged.load_state_dict(state, assign=True)
        save_model(folder, averaged, statistics=statistics, config=config, card={"step": step})

    decode = decode or texture_decoder(config)
    return Job(
        config=config,
        train=config.train,
        optimizer=config.optimizer,
        deepspeed=config.deepspeed,
        model=model,
        objective=objective,
        terms=term_names(config),
        batches=batches,
        export=export,
        evaluate=None if held_out is None else lambda engine: validation_loss(engine, config, held_out, statistics),
        samples=lambda engine: sample_picture(engine, config, statistics, decode),
        bins=bins,
        num_bins=CLOCK_BINS,
        record={"statistics": statistics_as_json(statistics)},
        identity={"num_samples": len(shards), "statistics": fingerprint(statistics)},
        free_keys=FREE_KEYS,
        num_samples=len(shards),
        flops_per_sample=model.num_flops(training=True),
    )


def statistics_as_json(statistics: LatentStatistics) -> dict:
    """Exact: a float32 is written as the shortest decimal that reads back as the same number."""
    names = ("texture_mean", "texture_std", "semantic_mean", "semantic_std")
    return {name: getattr(statistics, name).tolist() for name in names} | {"multiplier": statistics.multiplier}


def fingerprint(statistics: LatentStatistics) -> str:
    """A short digest of the statistics' exact values."""
    import hashlib

    digest = hashlib.sha256()
    for values in (
        statistics.texture_mean, statistics.texture_std, statistics.semantic_mean, statistics.semantic_std,
        torch.tensor(statistics.multiplier),
    ):  # fmt: skip
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
