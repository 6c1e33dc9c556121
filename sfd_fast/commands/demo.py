"""`sfd demo`: the whole of SFD once, on images that come with scikit-learn, in minutes on a CPU, without a download.

Patch features -> SemVAE -> composite latents -> two-clock DiT with REPA, and a guide -> three-stage guided sampling.
Every part is the real one: the same shards, training loop, checkpoints and pipeline that serve ImageNet.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sfd_fast import pictures
from sfd_fast.config import (
    DataConfig,
    FeatureDataConfig,
    GuidanceConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    SemVAEConfig,
    SemVAETrainingConfig,
    SFDConfig,
    TrainConfig,
    TransportConfig,
    require,
)
from sfd_fast.config.presets import DIGITS, DIGITS_GUIDE
from sfd_fast.data import digits
from sfd_fast.data.cache import layout
from sfd_fast.data.cache.shards import write_shard
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.diffusion.transport import feature_map, feature_tokens
from sfd_fast.evaluation.metrics import frechet_distance
from sfd_fast.evaluation.statistics import RunningStatistics
from sfd_fast.formats.released_model import load_semvae
from sfd_fast.models.texture import IdentityCodec, to_uint8
from sfd_fast.sampling.pipeline import SFDPipeline
from sfd_fast.training.diffusion import run_train
from sfd_fast.training.loop import TrainResult
from sfd_fast.training.semvae import run_train_semvae

SEMANTIC_CHANNELS = DIGITS.semantic_channels


@dataclass(frozen=True)
class DemoConfig:
    """Options of the embedded demo."""

    out: str = "runs/demo"
    """where pictures, metrics and checkpoints go"""
    seed: int = 0
    num_images: int = 1000
    """generated digits, class-balanced; at least 10"""
    encoder_steps: int = 600
    semvae_steps: int = 500
    train_steps: int = 1500
    guide_steps: int = 300
    guidance_scale: float = 1.5
    """AutoGuidance weight; the released models use 1.5 and 1.6 (docs/METHOD.md 5)"""
    num_steps: int = SamplerConfig().num_steps
    """steps of the default solver, one network evaluation each"""
    progress: bool = True

    def __post_init__(self) -> None:
        require(self.num_images >= 10, f"num_images {self.num_images} must be at least 10, one of each digit")
        for name in ("encoder_steps", "semvae_steps", "train_steps", "guide_steps"):
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1")


def run_demo(config: DemoConfig) -> None:
    """Runs everything, writes the files that README.md names into config.out, and says where to look."""
    start = time.monotonic()
    torch.set_num_threads(1)  # networks so small gain nothing from a second core, and lose much where it is busy
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = digits.load(config.seed)
    say(f"{len(train)} training and {len(held_out)} held-out handwritten digits")

    encoder, encoder_losses = digits.train_encoder(
        train, seed=config.seed, num_steps=config.encoder_steps, progress=config.progress
    )
    cache = out / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    for name, part in (("features", train), ("features_held_out", held_out)):
        write_shard(cache / name / "00000.safetensors", {
            layout.FEATURES: encoder.features(part.images), layout.LABELS: part.labels,
        })  # fmt: skip
    semvae_run = fresh_run(out / "semvae", semvae_config(config, cache), run_train_semvae, config)
    write_latents(cache, encoder, semvae_run.model, train, held_out)

    main_config = diffusion_config(config, cache)
    main_run = fresh_run(out / "main", main_config, run_train, config)
    guide_run = fresh_run(out / "guide", guide_config(config, main_config), run_train, config)
    model = out / "model"
    assemble(config, model, main_run, guide_run)
    pipeline = SFDPipeline.from_pretrained(model)

    labels = torch.arange(config.num_images) % 10
    say(f"sampling {config.num_images} digits in three stages")
    images = pipeline(labels, seed=config.seed, output_type="np", progress=config.progress).images
    np.savez(out / "samples.npz", arr_0=images, arr_1=labels.numpy())
    metrics = judge(config, images, labels.numpy(), train, held_out)
    metrics["seconds"] = time.monotonic() - start
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")

    pictures.sample_grid(out / "samples.png", uint8(train), train.labels.numpy(), images, labels.numpy())
    runs = {"SemVAE": semvae_run.metrics, "two-clock DiT": main_run.metrics, "guide": guide_run.metrics}
    pictures.loss_curves(out / "training.png", runs, {"patch encoder": encoder_losses})
    draw_stages(pipeline, config, out / "stages.png")
    report(out, metrics)


def say(message: str) -> None:
    print(f"[demo] {message}", flush=True)


def fresh_run(folder: Path, run_config: object, run, config: DemoConfig) -> TrainResult:
    """A training run from its start: the demo never continues an older one in the same folder."""
    shutil.rmtree(folder, ignore_errors=True)
    say(f"training into {folder}")
    return run(run_config, device="cpu", progress=config.progress)


def optimizer_config(lr: float) -> OptimizerConfig:
    """AdamW for a run of a thousand steps: cosine decay to zero, an average over the last hundreds of steps."""
    return OptimizerConfig(
        lr=lr, beta2=0.99, warmup_steps=100, schedule="cosine", final_lr_ratio=0.0, ema_decay=0.998, ema_warmup=True
    )


def train_config(config: DemoConfig, num_steps: int) -> TrainConfig:
    return TrainConfig(max_steps=num_steps, global_batch_size=64, seed=config.seed, precision="fp32")


def watched(config: DemoConfig, name: str, num_steps: int) -> RunConfig:
    return RunConfig(
        out=str(Path(config.out) / name), log_every=25, validate_every=max(num_steps // 4, 1), sample_every=0,
        checkpoint_every=max(num_steps // 2, 1), keep_checkpoints=1,
    )  # fmt: skip


def semvae_config(config: DemoConfig, cache: Path) -> SemVAETrainingConfig:
    return SemVAETrainingConfig(
        semvae=SemVAEConfig(
            feature_channels=digits.FEATURE_CHANNELS, hidden_size=48, num_heads=6, encoder_depth=2, decoder_depth=2,
            latent_channels=SEMANTIC_CHANNELS,
        ),
        optimizer=optimizer_config(2e-3),
        data=FeatureDataConfig(path=str(cache / "features"), validation_samples=100, flip=False),
        train=train_config(config, config.semvae_steps),
        run=watched(config, "semvae", config.semvae_steps),
    )  # fmt: skip


def diffusion_config(config: DemoConfig, cache: Path) -> SFDConfig:
    return SFDConfig(
        model=DIGITS,
        transport=TransportConfig(delta_t=0.3, repa_weight=0.5),
        optimizer=optimizer_config(2e-3),
        data=DataConfig(path=str(cache / "latents"), validation_path=str(cache / "latents_held_out"), flip=False),
        train=train_config(config, config.train_steps),
        run=watched(config, "main", config.train_steps),
    )


def guide_config(config: DemoConfig, main: SFDConfig) -> SFDConfig:
    """AutoGuidance's weaker model: smaller, trained for less, on the same cache."""
    return SFDConfig(
        model=DIGITS_GUIDE, transport=main.transport, optimizer=main.optimizer, data=main.data,
        train=train_config(config, config.guide_steps),
        run=watched(config, "guide", config.guide_steps),
    )  # fmt: skip


def write_latents(
    cache: Path, encoder: digits.PatchEncoder, semvae_folder: Path, train: digits.Digits, held_out: digits.Digits
) -> None:
    """Composite latents of both parts as shards, with the statistics of the training part beside each."""
    semvae = load_semvae(semvae_folder)
    codec = IdentityCodec(DIGITS.texture_channels, downsampling=2)
    for name, part in (("latents", train), ("latents_held_out", held_out)):
        features = encoder.features(part.images)  # (N, F, 4, 4)
        with torch.no_grad():
            semantic, _ = semvae.encode(feature_tokens(features))  # (N, 16, C_s)
        shard = {
            layout.TEXTURE: codec.encode(part.images)[0],
            layout.SEMANTIC: feature_map(semantic).contiguous(),
            layout.LABELS: part.labels,
            layout.FEATURES: features,
        }
        if name == "latents":
            statistics = LatentStatistics.from_moments(*layout.moments(shard))
        write_shard(cache / name / "00000.safetensors", shard)
        statistics.save(cache / name)


def assemble(config: DemoConfig, folder: Path, main: TrainResult, guide: TrainResult) -> None:
    """The folder that `sfd sample` and SFDPipeline load: network, guide, codec, statistics and sampling defaults."""
    SFDPipeline.from_pretrained(
        main.model,
        guide=guide.model,
        codec=IdentityCodec(DIGITS.texture_channels, downsampling=2),
        sampler=SamplerConfig(num_steps=config.num_steps),
        guidance=GuidanceConfig(mode="autoguidance", scale=config.guidance_scale),
        micro_batch_size=100,
        device="cpu",
    ).save_pretrained(folder)


def draw_stages(pipeline: SFDPipeline, config: DemoConfig, path: Path) -> None:
    """Semantics and texture of four digits along the three stages."""
    labels = [2, 3, 5, 8]
    frames = pipeline.trajectory(labels, num_frames=10, seed=config.seed)
    pictures.stage_strip(
        path, [f.tau for f in frames], [f.semantic for f in frames], [f.images for f in frames], labels,
        pipeline.delta_t,
    )  # fmt: skip


def uint8(part: digits.Digits) -> np.ndarray:
    return to_uint8(part.images).numpy()


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of the 64 grey values in [0, 1]."""
    collected = []
    for images in (first, second):
        statistics = RunningStatistics(64)
        statistics.update(torch.from_numpy(digits.pixels(images)))
        collected.append(statistics.result())
    return frechet_distance(*collected)


def judge(
    config: DemoConfig, images: np.ndarray, labels: np.ndarray, train: digits.Digits, held_out: digits.Digits
) -> dict:
    """Are they the digits they should be, and no copies? Every figure beside that of real digits."""
    real, unseen = uint8(train), uint8(held_out)
    svc = digits.Judge(real, train.labels.numpy())
    copies = svc.nearest_distance(images), svc.nearest_distance(unseen)
    order = random_numbers.permutation(len(unseen), seed=config.seed, stream=random_numbers.OUTPUT_ORDER).numpy()
    half = len(order) // 2
    return {
        "seed": config.seed,
        "num_images": len(images),
        "recognised": svc.accuracy(images, labels),
        "recognised_held_out": svc.accuracy(unseen, held_out.labels.numpy()),
        "nearest_training_digit": copies[0],
        "nearest_training_digit_held_out": copies[1],
        "nearest_ratio": copies[0] / copies[1],
        "frechet_to_held_out": frechet(images, unseen),
        "frechet_between_real_halves": frechet(unseen[order[:half]], unseen[order[half:]]),
    }


NO_COPIES = 0.7
"""generated digits are no copies where they are at least this much as far from training digits as held-out ones"""


def report(out: Path, metrics: dict) -> None:
    """The closing lines: what came out and where to look."""
    verdict = "they are no copies" if metrics["nearest_ratio"] >= NO_COPIES else "so near that they may be copies"
    say(
        f"recognised as their label: {metrics['recognised']:.1%} of {metrics['num_images']} generated digits "
        f"(held-out real ones: {metrics['recognised_held_out']:.1%})"
    )
    say(
        f"median distance to the nearest training digit: {metrics['nearest_training_digit']:.2f} "
        f"({metrics['nearest_ratio']:.2f} of that of held-out digits: {verdict})"
    )
    say(
        f"Frechet distance of pixels to held-out digits: {metrics['frechet_to_held_out']:.2f} "
        f"(between two halves of real ones: {metrics['frechet_between_real_halves']:.2f})"
    )
    say(f"done in {metrics['seconds']:.0f} s. Look at:")
    for name, what in (
        ("samples.png", "real digits beside generated ones"),
        ("stages.png", "semantics and texture along the three stages"),
        ("training.png", "loss curves"),
        ("samples.npz", "the generated digits, arr_0 (M, 8, 8, 3) uint8 and arr_1 labels"),
        ("metrics.json", "the figures above"),
        ("model", f"the trained pipeline: sfd sample --model {out / 'model'}"),
    ):
        print(f"    {str(out / name):<{len(str(out)) + 15}}{what}")
