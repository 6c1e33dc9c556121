"""`sfd demo`: the whole of SFD once, on images that come with scikit-learn, in minutes on a CPU, without a download.

Patch features -> SemVAE -> composite latents -> two-clock DiT with REPA, and a guide -> three-stage guided sampling.
Every part is the real one: the same shards, training loop, checkpoints and pipeline that serve ImageNet.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sfd_fast.config import (
    FeatureDataConfig,
    GuidanceConfig,
    SamplerConfig,
    SemVAEConfig,
    SemVAETrainingConfig,
    Settings,
    SFDConfig,
    overlaid,
    require,
)
from sfd_fast.config.checks import Count, FilePath, Range
from sfd_fast.config.presets import DIGITS, PRESETS
from sfd_fast.config.recipes import recipe
from sfd_fast.config.sampling import NumSteps

if TYPE_CHECKING:
    import numpy as np

    from sfd_fast.data import digits
    from sfd_fast.sampling.pipeline import SFDPipeline
    from sfd_fast.training.loop import TrainResult

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MARK = "demo.json"
"""the settings of the demo that wrote a folder: without it a folder is someone else's"""


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Options of the embedded demo."""

    out: FilePath = "runs/demo"
    """where pictures, metrics and checkpoints go: a folder that is new, empty, or of an earlier demo"""
    seed: int = 0
    num_images: Annotated[int, Range(10)] = 1000
    """generated digits, class-balanced; at least 10, one of each"""
    encoder_steps: Count = 600
    semvae_steps: Count = 500
    train_steps: Count = recipe("DIGITS").max_steps
    guide_steps: Count = recipe("DIGITS_GUIDE").max_steps
    guidance_scale: float = recipe("DIGITS").guidance_scale
    """AutoGuidance weight; the released models use 1.5 and 1.6 (docs/METHOD.md 5)"""
    num_inference_steps: NumSteps = SamplerConfig().num_inference_steps
    """steps of the default solver, one network evaluation each"""
    progress: bool = True


def run_demo(config: DemoConfig) -> None:
    """Runs everything, writes the files that README.md names into config.out, and says where to look.

    Raises ValueError where config.out holds files of another origin.
    """
    import numpy as np
    import torch

    from sfd_fast import pictures
    from sfd_fast.data import digits
    from sfd_fast.data.cache import layout
    from sfd_fast.data.cache.shards import write_shard
    from sfd_fast.sampling.pipeline import SFDPipeline
    from sfd_fast.training.diffusion import run_train
    from sfd_fast.training.semvae import run_train_semvae

    start = time.monotonic()
    torch.set_num_threads(1)  # networks so small gain nothing from a second core, and lose much where it is busy
    out = claimed(config)
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
    main = diffusion_config(config, "DIGITS", "main", config.train_steps)
    semvae_run = fresh_run(semvae_config(config, main), run_train_semvae, config)
    write_latents(cache, encoder, semvae_run.model, train, held_out)
    main_run = fresh_run(main, run_train, config)
    guide_run = fresh_run(diffusion_config(config, "DIGITS_GUIDE", "guide", config.guide_steps), run_train, config)
    assemble(config, out / "model", main_run, guide_run)
    pipeline = SFDPipeline.from_pretrained(out / "model")

    labels = torch.arange(config.num_images) % 10
    say(f"sampling {config.num_images} digits in three stages")
    pipeline.set_progress_bar_config(disable=not config.progress)
    images = np.stack([np.asarray(image) for image in pipeline(labels, seed=config.seed).images])
    np.savez(out / "samples.npz", arr_0=images, arr_1=labels.numpy())
    metrics = judge(config, images, labels.numpy(), train, held_out)
    metrics["seconds"] = time.monotonic() - start
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")

    pictures.sample_grid(out / "samples.png", uint8(train), train.labels.numpy(), images, labels.numpy())
    runs = {"SemVAE": semvae_run.metrics, "two-clock DiT": main_run.metrics, "guide": guide_run.metrics}
    pictures.loss_curves(out / "training.png", runs, {"patch encoder": encoder_losses})
    draw_stages(pipeline, config, out / "stages.png")
    report(out, metrics)


def claimed(config: DemoConfig) -> Path:
    """The demo's folder with our mark in it. ValueError where it holds something else, OSError where it cannot be."""
    out = Path(config.out)
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    require(
        not names or MARK in names,
        f"{out} holds {', '.join(names[:3])}{' and more' if names[3:] else ''} and no {MARK}, so `sfd demo` did not "
        "write it: choose another folder with --out",
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text(json.dumps(vars(config), indent=1) + "\n")
    return out


def say(message: str) -> None:
    print(f"[demo] {message}", flush=True)


def fresh_run(made: SFDConfig | SemVAETrainingConfig, run: Callable, config: DemoConfig) -> "TrainResult":
    """A training run from its start: the demo never continues an older one in the same folder."""
    shutil.rmtree(made.run.out, ignore_errors=True)
    say(f"training into {made.run.out}")
    return run(made, device="cpu", progress=config.progress)


def diffusion_config(config: DemoConfig, preset: str, name: str, num_steps: int) -> SFDConfig:
    """The run of a preset by its recipe, in the demo's folders."""
    out = Path(config.out)
    return overlaid(SFDConfig(model=PRESETS[preset]), recipe(preset).settings() | {
        "run.out": str(out / name), "train.max_steps": num_steps, "train.seed": config.seed,
        "data.path": str(out / "cache" / "latents"), "data.validation_path": str(out / "cache" / "latents_held_out"),
    })  # fmt: skip


def semvae_config(config: DemoConfig, main: SFDConfig) -> SemVAETrainingConfig:
    """SemVAE is trained as the diffusion transformer is."""
    return SemVAETrainingConfig(
        semvae=SemVAEConfig(
            feature_channels=DIGITS.repa_channels, hidden_size=48, num_heads=6, encoder_depth=2, decoder_depth=2,
            latent_channels=DIGITS.semantic_channels,
        ),
        optimizer=main.optimizer,
        data=FeatureDataConfig(path=str(Path(config.out, "cache", "features")), validation_samples=100, flip=False),
        train=replace(main.train, max_steps=config.semvae_steps),
        run=replace(main.run, out=str(Path(config.out, "semvae"))),
    )  # fmt: skip


def write_latents(
    cache: Path, encoder: "digits.PatchEncoder", semvae_folder: Path, train: "digits.Digits", held_out: "digits.Digits"
) -> None:
    """Composite latents of both parts as shards, with the statistics of the training part beside each."""
    import torch

    from sfd_fast.data.cache import layout
    from sfd_fast.data.cache.shards import write_shard
    from sfd_fast.diffusion.statistics import LatentStatistics
    from sfd_fast.diffusion.transport import feature_map, feature_tokens
    from sfd_fast.formats.released_model import load_semvae
    from sfd_fast.models.texture import IdentityCodec

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


def assemble(config: DemoConfig, folder: Path, main: "TrainResult", guide: "TrainResult") -> None:
    """The folder that `sfd sample` and SFDPipeline load: network, guide, codec, statistics and sampling defaults."""
    import torch

    from sfd_fast.models.texture import IdentityCodec
    from sfd_fast.sampling.pipeline import SFDPipeline

    SFDPipeline.from_pretrained(
        main.model,
        guide=guide.model,
        texture_codec=IdentityCodec(DIGITS.texture_channels, downsampling=2),
        sampler=SamplerConfig(num_inference_steps=config.num_inference_steps),
        guidance=GuidanceConfig(mode="autoguidance", scale=config.guidance_scale),
        id2label=NAMES,
        micro_batch_size=100,
        device="cpu",
        torch_dtype=torch.float32,  # what is saved keeps every bit
    ).save_pretrained(folder)


def draw_stages(pipeline: "SFDPipeline", config: DemoConfig, path: Path) -> None:
    """Semantics and texture of four digits along the three stages."""
    from sfd_fast import pictures

    labels = [2, 3, 5, 8]
    frames = pipeline.trajectory(labels, num_frames=10, seed=config.seed)
    pictures.stage_strip(
        path, [f.tau for f in frames], [f.semantic for f in frames], [f.images for f in frames], labels,
        pipeline.delta_t,
    )  # fmt: skip


def uint8(part: "digits.Digits") -> "np.ndarray":
    from sfd_fast.models.texture import to_uint8

    return to_uint8(part.images).numpy()


def frechet(first: "np.ndarray", second: "np.ndarray") -> float:
    """Frechet distance of the 64 grey values in [0, 1]."""
    import torch

    from sfd_fast.data import digits
    from sfd_fast.evaluation.metrics import frechet_distance
    from sfd_fast.evaluation.statistics import RunningStatistics

    collected = []
    for images in (first, second):
        statistics = RunningStatistics(64)
        statistics.update(torch.from_numpy(digits.pixels(images)))
        collected.append(statistics.result())
    return frechet_distance(*collected)


def judge(
    config: DemoConfig, images: "np.ndarray", labels: "np.ndarray", train: "digits.Digits", held_out: "digits.Digits"
) -> dict:
    """Are they the digits they should be, and no copies? Every figure beside that of real digits."""
    from sfd_fast.data import digits
    from sfd_fast.diffusion import random_numbers

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
