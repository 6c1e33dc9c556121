"""`sfd sample`: any number of images on any number of processes, resumable, each a function of (seed, id, label).

Work is cut into units of one micro-batch; a process takes every WORLD_SIZE-th unit, skips those that are there already,
and writes each whole or not at all. So what was interrupted goes on with the same command, on as many processes as
there are then, and ends with the same files.
"""

import json
import numbers
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sfd_fast import pictures
from sfd_fast.config import GuidanceConfig, Precision, SamplerConfig, require, to_dict
from sfd_fast.files.atomic import create_once
from sfd_fast.files.digest import tensors_digest
from sfd_fast.ranks import Ranks
from sfd_fast.sampling.image_writer import AsyncWriter
from sfd_fast.sampling.output import POLL_S, Progress, Pulse, SampleFiles, wait_for_all
from sfd_fast.sampling.pipeline import SFDPipeline

RUN = "run.json"
"""what the images of a folder are made from"""
CLAIM_S = 10.0
"""run.json is read again for so long where another process may still be writing it"""
GRID, STAGES = "grid.png", "stages.png"
STRIP_IMAGES, STRIP_FRAMES = 4, 10


@dataclass(frozen=True)
class SampleConfig:
    """Options of large-scale generation."""

    model: str = ""
    """pipeline folder or hub name; or a network's folder (RUN/model, or of `sfd convert`) with `codec`"""
    out: str = "runs/samples"
    num: int = 0
    """number of images; 0: one per entry of `labels`, or 64"""
    labels: tuple[int, ...] | str = ()
    """comma-separated; image i gets labels[i % len(labels)]; empty: every class in turn, so classes are balanced"""
    seed: int = 0
    format: Literal["png", "webp", "npz"] = "png"
    """png and webp: out/images/NUMBER.png; npz: out/samples.npz with arr_0 images and arr_1 labels"""
    shuffle_seed: int = 0
    """order of the images in samples.npz"""
    guide: str = ""
    """guide network's folder, where the pipeline has none or another is wanted"""
    codec: str = ""
    """texture codec's folder or file, for a network's folder"""
    num_steps: int | None = None
    """this and the next ones: each, where given, instead of the pipeline's own setting"""
    solver: Literal["euler", "midpoint", "heun", "ab2", "abm3", "rk4", "dopri5"] | None = None
    timestep_shift: float | None = None
    time_grid: Literal["exact", "released"] | None = None
    """with dopri5 the released grid makes an image depend on its micro-batch"""
    atol: float | None = None
    rtol: float | None = None
    guidance_scale: float | None = None
    guidance_mode: Literal["none", "cfg", "autoguidance"] | None = None
    texture_scale: float | None = None
    semantic_scale: float | None = None
    interval_start: float | None = None
    interval_mode: Literal["both", "tex", "sem"] | None = None
    micro_batch_size: int = 0
    """images at once; 0: the pipeline's. Another size changes some pixels by one level of 255"""
    precision: Precision = "fp32"
    backend: Literal["eager", "compile", "cuda_graph"] = "eager"
    device: str = ""
    """cpu, cuda (device LOCAL_RANK) or cuda:N; empty: cuda where there is one, else the CPU"""
    num_writers: int = 4
    """threads that encode and write images"""
    stall_s: float = 900.0
    """rank 0 gives up on another process that shows no sign of life for so many seconds, or ten times as long writes
    nothing"""
    grid: int = 64
    """images in the picture grid out/grid.png; 0: none"""
    show_stages: bool = False
    """also draw out/stages.png: semantics and texture along the three stages"""
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", parse_labels(self.labels))
        require(self.num >= 0, f"num {self.num} must not be negative")
        require(self.num_writers >= 1, f"num_writers {self.num_writers} must be at least 1")
        require(self.stall_s > 0, f"stall_s {self.stall_s} must be greater than 0")
        scales = {name: getattr(self, name) for name in ("guidance_scale", "texture_scale", "semantic_scale")}
        for name, scale in scales.items():
            require(
                self.guidance_mode != "none" or scale in (None, 1.0),
                f"{name} {scale} contradicts guidance_mode none: leave one of them out, or give --guidance_mode cfg or "
                "autoguidance",
            )
        require(self.grid >= 0, f"grid {self.grid} must not be negative")
        require(self.micro_batch_size >= 0, f"micro_batch_size {self.micro_batch_size} must not be negative")
        require(self.format in ("png", "webp", "npz"), f"format '{self.format}' is unknown; choose png, webp or npz")

    @property
    def num_images(self) -> int:
        return self.num or len(self.labels) or 64


@dataclass(frozen=True)
class SampleResult:
    """What a process did: images it made itself, its time, and where the whole is (npz on rank 0 only)."""

    out: Path
    num_made: int
    seconds: float
    npz: Path | None = None


def balanced_labels(num: int, num_classes: int) -> torch.Tensor:
    """Every class in turn: the numbers of images of two classes differ by at most one."""
    return torch.arange(num) % num_classes


def run_sample(config: SampleConfig) -> SampleResult:
    """Generates this process's share; rank 0 then waits for all, gathers the npz and draws the grid.

    Raises ValueError for bad settings, or where `out` holds samples of other ones; OSError where it cannot be written
    or another process has stopped.
    """
    ranks = Ranks.read()  # processes never meet
    require(bool(config.model), "model is empty; give a pipeline folder, for example --model runs/demo/model")
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error}): choose another folder with --out") from error
    with Pulse(out, ranks.rank, config.stall_s):
        return sample_share(config, ranks, load_pipeline(config, ranks))


def sample_share(config: SampleConfig, ranks: Ranks, pipeline: SFDPipeline) -> SampleResult:
    out = Path(config.out)
    labels = given_or_balanced(config, pipeline)
    labels, sample_ids = pipeline.checked_inputs(labels, None, config.seed)
    settings = chosen_settings(config, pipeline)
    if ranks.first:
        say_unused_guide(pipeline, settings[1])
    claim(out, record_of(config, pipeline, labels, settings))

    files = SampleFiles(out, config.format, len(labels), pipeline.micro_batch_size)
    if not files.npz.exists():
        files.folder.mkdir(exist_ok=True)
    start = time.monotonic()
    progress = Progress(files, shown=config.progress and ranks.first)
    if ranks.first and progress.units_before:
        print(f"{progress.units_before} of {len(files.starts)} micro-batches are there already")
    mine = [first for first in files.starts[ranks.rank :: ranks.world_size] if not files.finished(first)]
    chosen = torch.cat([torch.tensor(files.numbers(first)) for first in mine] or [torch.empty(0).long()])
    images = pipeline.generate(labels[chosen], sample_ids[chosen], config.seed, *settings)
    with AsyncWriter(config.num_writers, max_waiting=4 * max(files.size, config.num_writers)) as writer:
        for first, part in zip(mine, images, strict=True):
            files.write(writer, first, part)
            if ranks.first:
                progress.update()
    npz = finish(config, files, progress, pipeline, labels, settings, start) if ranks.first else None
    return SampleResult(out, len(chosen), time.monotonic() - start, npz)


def finish(
    config: SampleConfig,
    files: SampleFiles,
    progress: Progress,
    pipeline: SFDPipeline,
    labels: torch.Tensor,
    settings: tuple[SamplerConfig, GuidanceConfig],
    start: float,
) -> Path | None:
    """What rank 0 does when its own images are there: waits for the others', draws, gathers, reports."""
    progress.update(now=True)
    wait_for_all(files, progress, config.stall_s)
    progress.bar.close()
    made, seconds = progress.done - progress.before, time.monotonic() - start
    drawn = [files.out / GRID] if config.grid else []
    if not files.npz.exists():
        draw_grid(config, files)
    npz = files.gather(labels, config.shuffle_seed)
    if config.show_stages:
        draw_stages(files.out, pipeline, labels, config.seed, settings)
        drawn.append(files.out / STAGES)
    if made:
        print(f"{made} images in {seconds:.1f} s ({made / seconds:.2f} images/s on all processes)")
    print("look at " + ", ".join(str(path) for path in [npz or files.folder, *drawn]))
    return npz


def load_pipeline(config: SampleConfig, ranks: Ranks) -> SFDPipeline:
    options = {"precision": config.precision, "backend": config.backend, "device": ranks.device(config.device)}
    if config.micro_batch_size:
        options["micro_batch_size"] = config.micro_batch_size
    return SFDPipeline.from_pretrained(config.model, guide=config.guide or None, codec=config.codec or None, **options)


def say_unused_guide(pipeline: SFDPipeline, guidance: GuidanceConfig) -> None:
    """One line where a guide network is loaded that these settings never run."""
    if pipeline.guide is None or (guidance.mode == "autoguidance" and guidance.active):
        return
    why = "guidance is off" if not guidance.active else f"guidance mode is {guidance.mode}"
    print(f"the guide is not used, as {why}: --guidance_mode autoguidance --guidance_scale 1.5 would use it")


def parse_labels(labels: str | Sequence[int]) -> tuple[int, ...]:
    """(1, 2), [1, 2] of a YAML file, or "1,2" of the command line. Raises ValueError for what is no whole number."""
    words = labels.strip("[]() ").replace(",", " ").split() if isinstance(labels, str) else labels
    try:
        if not all(isinstance(word, str | numbers.Integral) for word in words):
            raise ValueError("a class is a whole number")
        return tuple(int(word) for word in words)
    except ValueError:
        raise ValueError(f"labels '{labels}' must be whole numbers of classes, separated by commas") from None


def chosen_settings(config: SampleConfig, pipeline: SFDPipeline) -> tuple[SamplerConfig, GuidanceConfig]:
    """The pipeline's own settings, overlaid with those that were given."""

    def given(**names: object) -> dict:
        return {name: value for name, value in names.items() if value is not None}

    pipeline.sampler = replace(
        pipeline.sampler, **given(grid=config.time_grid, atol=config.atol, rtol=config.rtol)
    )
    guidance = pipeline.guidance
    if config.guidance_mode == "none":
        guidance = GuidanceConfig()
    interval = given(interval_start=config.interval_start, interval_mode=config.interval_mode)
    guidance = replace(guidance, **interval, **given(mode=config.guidance_mode))
    _, guidance = pipeline.resolve(guidance_scale=config.guidance_scale, guidance=guidance)
    guidance = replace(guidance, **given(texture_scale=config.texture_scale, semantic_scale=config.semantic_scale))
    return pipeline.resolve(
        config.num_steps, None, solver=config.solver, timestep_shift=config.timestep_shift, guidance=guidance
    )


def given_or_balanced(config: SampleConfig, pipeline: SFDPipeline) -> torch.Tensor:
    if not config.labels:
        return balanced_labels(config.num_images, pipeline.config.num_classes)
    return torch.tensor(config.labels)[torch.arange(config.num_images) % len(config.labels)]


def weights_digest(*modules: nn.Module | None) -> str:
    """16 hexadecimal digits that tell networks apart by their tensors."""
    parts = enumerate(module for module in modules if module is not None)
    return tensors_digest({f"{i}.{name}": t for i, module in parts for name, t in module.state_dict().items()})[:16]


def record_of(
    config: SampleConfig, pipeline: SFDPipeline, labels: torch.Tensor, settings: tuple[SamplerConfig, GuidanceConfig]
) -> dict:
    """All that the images follow from."""
    sampler, guidance = settings
    return {
        "model": config.model,
        "weights": weights_digest(pipeline.model, pipeline.guide if guidance.mode == "autoguidance" else None),
        "codec": weights_digest(pipeline.codec),
        "statistics": pipeline.statistics.digest(),
        "num": len(labels),
        "labels": tensors_digest({"labels": labels})[:16],
        "seed": config.seed,
        "format": config.format,
        "shuffle_seed": config.shuffle_seed,
        "micro_batch_size": pipeline.micro_batch_size,
        "precision": pipeline.precision,
        "backend": pipeline.runners.backend,
        "device": pipeline.device.type,
        "delta_t": pipeline.delta_t,
        "sampler": to_dict(sampler),
        "guidance": to_dict(guidance),
    }


def claim(out: Path, record: dict) -> None:
    """Marks the folder as holding these samples; ValueError where it holds others."""
    path = out / RUN
    if create_once(path, (json.dumps(record, indent=1) + "\n").encode()):
        return
    there = read_claim(path)
    different = [key for key in record if key != "model" and there.get(key) != record[key]]
    if different:
        key = different[0]
        raise ValueError(
            f"{out} holds samples of other settings: {key} is {there.get(key)} there and {record[key]} now; go on with "
            "the same settings, or choose another folder with --out"
        )


def read_claim(path: Path) -> dict:
    """The settings in run.json, which another process may be writing at this moment. Raises ValueError if it stays
    torn."""
    until = time.monotonic() + CLAIM_S
    while True:
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            if time.monotonic() > until:
                raise ValueError(
                    f"{path} is damaged ({error}): delete it to go on with the images that are there, or choose "
                    "another folder with --out"
                ) from error
        time.sleep(POLL_S)


def draw_grid(config: SampleConfig, files: SampleFiles) -> None:
    """grid.png of the first images."""
    count = min(config.grid, files.num)
    if count and not (files.out / GRID).exists():
        pictures.save(files.out / GRID, pictures.tile(files.first_images(count), max(1, round(count**0.5))))


def draw_stages(
    out: Path, pipeline: SFDPipeline, labels: torch.Tensor, seed: int, settings: tuple[SamplerConfig, GuidanceConfig]
) -> None:
    """stages.png: how the first images come about."""
    count = min(STRIP_IMAGES, pipeline.micro_batch_size, len(labels))
    frames = pipeline.frames(labels[:count], torch.arange(count), seed, *settings, num_frames=STRIP_FRAMES)
    pictures.stage_strip(
        out / STAGES,
        [frame.tau for frame in frames],
        [frame.semantic for frame in frames],
        [frame.images for frame in frames],
        labels[:count].tolist(),
        pipeline.delta_t,
    )
