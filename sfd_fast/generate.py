"""`sfd sample`: any number of images on any number of processes, resumable, each a function of (seed, id, label).

Work is cut into units of one micro-batch; a process takes every WORLD_SIZE-th unit, skips those that are there already,
and writes each whole or not at all. So what was interrupted goes on with the same command, on as many processes as
there are then, and ends with the same files.
"""

import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from sfd_fast import pictures, streams
from sfd_fast.config import GuidanceConfig, Precision, SamplerConfig, require, to_dict
from sfd_fast.image_files import (
    AsyncWriter,
    create_once,
    remove_temporary_files,
    write_image,
    write_npz,
    write_part,
    write_whole,
)
from sfd_fast.pipeline import SFDPipeline

RUN = "run.json"
"""what the images of a folder are made from"""
NPZ = "samples.npz"
STALL_S = 900
"""rank 0 gives up on the other ranks after so many seconds without a new file"""
POLL_S = 0.2
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
    """empty: CUDA device LOCAL_RANK where there is one, else the CPU"""
    num_writers: int = 4
    """threads that encode and write images"""
    grid: int = 64
    """images in the picture grid out/grid.png; 0: none"""
    show_stages: bool = False
    """also draw out/stages.png: semantics and texture along the three stages"""
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", parse_labels(self.labels))
        require(self.num >= 0, f"num {self.num} must not be negative")
        require(self.num_writers >= 1, f"num_writers {self.num_writers} must be at least 1")
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


def ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) from RANK, WORLD_SIZE, LOCAL_RANK, which every launcher sets; (0, 1, 0) without.

    Raises ValueError where they contradict each other.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    require(0 <= rank < world_size, f"RANK {rank} must be in [0, WORLD_SIZE = {world_size}): check the launcher")
    return rank, world_size, int(os.environ.get("LOCAL_RANK", 0))


def balanced_labels(num: int, num_classes: int) -> torch.Tensor:
    """Every class in turn: the numbers of images of two classes differ by at most one."""
    return torch.arange(num) % num_classes


def run_sample(config: SampleConfig) -> SampleResult:
    """Generates this process's share; rank 0 then waits for all, gathers the npz and draws the grid.

    Raises ValueError for bad settings, or where `out` holds samples of other ones; OSError where it cannot be written
    or another process has stopped.
    """
    rank, world_size, local_rank = ranks()
    require(bool(config.model), "model is empty; give a pipeline folder, for example --model runs/demo/model")
    out = Path(config.out)
    try:
        folder(config, out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error}): choose another folder with --out") from error
    pipeline = load_pipeline(config, local_rank)
    labels = given_or_balanced(config, pipeline)
    labels, sample_ids = pipeline.checked_inputs(labels, None, config.seed)
    settings = chosen_settings(config, pipeline)
    claim(out, record_of(config, pipeline, labels, settings))

    size, start = pipeline.micro_batch_size, time.monotonic()
    starts = list(range(0, len(labels), size))
    mine = [s for s in starts[rank::world_size] if not finished(config, out, s, size, len(labels))]
    if rank == 0 and len(mine) < len(starts[rank::world_size]):
        print(f"going on: {len(starts[rank::world_size]) - len(mine)} of {len(starts)} micro-batches are there already")
    chosen = torch.cat([torch.arange(s, min(s + size, len(labels))) for s in mine] or [torch.empty(0).long()])
    bar = _progress(len(chosen), config.progress and rank == 0)
    images = pipeline.generate(labels[chosen], sample_ids[chosen], config.seed, *settings)
    with AsyncWriter(config.num_writers, max_waiting=4 * max(size, config.num_writers)) as writer:
        for first, part in zip(mine, images, strict=True):
            write_unit(config, out, writer, first, part)
            bar.update(len(part))
    bar.close()
    seconds = time.monotonic() - start
    npz = None
    if rank == 0:
        wait_for_all(config, out, starts, size, len(labels))
        drawn = [out / GRID] if config.grid else []
        if not (out / NPZ).exists():
            draw_grid(config, out, starts, size, len(labels))
        npz = gather(config, out, labels, starts, size)
        if config.show_stages:
            draw_stages(out, pipeline, labels, config.seed, settings)
            drawn.append(out / STAGES)
        if len(chosen):
            rate = len(chosen) / seconds
            print(f"{len(chosen)} images in {seconds:.1f} s ({rate:.2f} images/s on this process)")
        print("look at " + ", ".join(str(path) for path in [npz or folder(config, out), *drawn]))
    return SampleResult(out, len(chosen), seconds, npz)


def load_pipeline(config: SampleConfig, local_rank: int) -> SFDPipeline:
    device = config.device or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    options = {"precision": config.precision, "backend": config.backend, "device": device}
    if config.micro_batch_size:
        options["micro_batch_size"] = config.micro_batch_size
    return SFDPipeline.from_pretrained(config.model, guide=config.guide or None, codec=config.codec or None, **options)


def parse_labels(labels: str | Sequence[int]) -> tuple[int, ...]:
    """(1, 2), [1, 2] of a YAML file, or "1,2" of the command line."""
    words = labels.strip("[]() ").replace(",", " ").split() if isinstance(labels, str) else labels
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        raise ValueError(f"labels '{labels}' must be numbers of classes, separated by commas") from None


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


def weights_checksum(*modules: nn.Module | None) -> str:
    """CRC-32 over all tensors of the networks: tells models apart, not attackers."""
    checksum = 0
    for module in modules:
        for value in module.state_dict().values() if module is not None else ():
            checksum = zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"


def record_of(
    config: SampleConfig, pipeline: SFDPipeline, labels: torch.Tensor, settings: tuple[SamplerConfig, GuidanceConfig]
) -> dict:
    """All that the images follow from."""
    sampler, guidance = settings
    return {
        "model": config.model,
        "weights": weights_checksum(pipeline.model, pipeline.guide if guidance.mode == "autoguidance" else None),
        "codec": weights_checksum(pipeline.codec),
        "num": len(labels),
        "labels": f"{zlib.crc32(labels.numpy()):08x}",
        "seed": config.seed,
        "format": config.format,
        "shuffle_seed": config.shuffle_seed,
        "micro_batch_size": pipeline.micro_batch_size,
        "precision": pipeline.precision,
        "delta_t": pipeline.delta_t,
        "sampler": to_dict(sampler),
        "guidance": to_dict(guidance),
    }


def claim(out: Path, record: dict) -> None:
    """Marks the folder as holding these samples; ValueError where it holds others."""
    path = out / RUN
    if create_once(path, (json.dumps(record, indent=1) + "\n").encode()):
        return
    there = json.loads(path.read_text())
    different = [key for key in record if key != "model" and there.get(key) != record[key]]
    if different:
        key = different[0]
        raise ValueError(
            f"{out} holds samples of other settings: {key} is {there.get(key)} there and {record[key]} now; go on with "
            "the same settings, or choose another folder with --out"
        )


def folder(config: SampleConfig, out: Path) -> Path:
    """Where single images, or the parts of the npz, are."""
    return out / ("parts" if config.format == "npz" else "images")


def image_path(config: SampleConfig, out: Path, number: int) -> Path:
    return folder(config, out) / f"{number:06d}.{config.format}"


def part_path(config: SampleConfig, out: Path, first: int) -> Path:
    return folder(config, out) / f"{first:08d}.npy"


def finished(config: SampleConfig, out: Path, first: int, size: int, total: int) -> bool:
    """Whether the micro-batch that begins with image `first` is on disk."""
    if config.format == "npz":
        return (out / NPZ).exists() or part_path(config, out, first).exists()
    return all(image_path(config, out, i).exists() for i in range(first, min(first + size, total)))


def write_unit(config: SampleConfig, out: Path, writer: AsyncWriter, first: int, images: np.ndarray) -> None:
    if config.format == "npz":
        writer.submit(lambda: write_part(part_path(config, out, first), images))
        return
    for number, image in enumerate(images, first):
        path = image_path(config, out, number)
        writer.submit(lambda path=path, image=image: write_image(path, image))


def wait_for_all(config: SampleConfig, out: Path, starts: list[int], size: int, total: int) -> None:
    """Returns when every process's images are on disk; OSError where nothing new appears for STALL_S seconds."""
    missing, since = starts, time.monotonic()
    while missing:
        left = [s for s in missing if not finished(config, out, s, size, total)]
        if len(left) < len(missing):
            since = time.monotonic()
        elif time.monotonic() - since > STALL_S:
            raise OSError(
                f"{len(left)} of {len(starts)} micro-batches are missing in {out} and nothing was written for "
                f"{STALL_S} s: another process has stopped; run the same command again to go on"
            )
        missing = left
        if missing:
            time.sleep(POLL_S)


def gather(config: SampleConfig, out: Path, labels: torch.Tensor, starts: list[int], size: int) -> Path | None:
    """Out of the parts the evaluator's npz, shuffled; beside pictures their labels as labels.npy."""
    remove_temporary_files(folder(config, out))
    if config.format != "npz":
        write_whole(out / "labels.npy", lambda file: np.save(file, labels.numpy()))
        return None
    path = out / NPZ
    if not path.exists():
        order = streams.permutation(len(labels), seed=config.shuffle_seed, stream=streams.OUTPUT_ORDER).numpy()
        others = {"arr_1": labels.numpy()[order], "sample_ids": order}
        write_npz(path, [part_path(config, out, s) for s in starts], order, size, others)
    for first in starts:
        part_path(config, out, first).unlink(missing_ok=True)
    folder(config, out).rmdir()
    return path


def draw_grid(config: SampleConfig, out: Path, starts: list[int], size: int, total: int) -> None:
    """grid.png of the first images."""
    count = min(config.grid, total)
    if count == 0 or (out / GRID).exists():
        return
    if config.format == "npz":
        parts = [np.load(part_path(config, out, s)) for s in starts[: -(-count // size)]]
        images = list(np.concatenate(parts)[:count])
    else:
        images = [np.asarray(Image.open(image_path(config, out, i)).convert("RGB")) for i in range(count)]
    pictures.save(out / GRID, pictures.tile(images, max(1, round(count**0.5))))


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


def _progress(total: int, shown: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="image", smoothing=0.1, disable=not shown)
