"""`sfd sample`: any number of images on any number of processes, resumable, each a function of (seed, id, label)."""

import numbers
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from sfd_fast import pictures
from sfd_fast.config import (
    GuidanceConfig,
    SamplerConfig,
    SamplingBackend,
    SamplingPrecision,
    SingleSettings,
    require,
    with_settings,
)
from sfd_fast.config.checks import Count, FilePath, Natural, NotNegative, Positive, Range
from sfd_fast.config.sampling import SETTINGS
from sfd_fast.ranks import Ranks

if TYPE_CHECKING:
    from sfd_fast.sampling.large_scale import Generation
    from sfd_fast.sampling.pipeline import SFDPipeline

STRIP_IMAGES, STRIP_FRAMES = 4, 10


@dataclass(frozen=True)
class SampleConfig(SingleSettings):
    """Options of large-scale generation."""

    model: FilePath = ""
    """pipeline folder or hub name; a run of `sfd train`; or the folder of a network that `sfd convert` wrote"""
    out: FilePath = "runs/samples"
    num_images: Annotated[int, Range(0, 100_000_000)] = 0
    """0: one per entry of `labels`, or 64"""
    labels: tuple[int | str, ...] | str = ()
    """numbers or names of classes, comma-separated ("golden retriever,tabby cat"), which images take in turn; empty:
    every class in turn, so classes are balanced"""
    seed: Natural = 0
    format: Literal["png", "webp", "npz"] = "png"
    """png and webp: out/images/NUMBER.png; npz: out/samples.npz with arr_0 images and arr_1 labels"""
    shuffle_seed: Natural = 0
    """order of the images in samples.npz"""
    guide: FilePath = ""
    """guide network's folder, where the pipeline has none or another is wanted"""
    texture_codec: FilePath = ""
    """texture codec's folder or file, where the model names none or another is wanted"""
    delta_t: NotNegative | None = None
    """offset of the two clocks; default: that of the training. The model was trained for no other"""
    micro_batch_size: Natural = 0
    """images at once; 0: the pipeline's. Another size changes some pixels by one level of 255"""
    precision: SamplingPrecision = "auto"
    """of the networks; auto: bf16 on a GPU that computes in it, else fp32"""
    backend: SamplingBackend = "auto"
    """auto: captured CUDA graphs on a GPU, else eager"""
    device: str = ""
    """cpu, cuda (device LOCAL_RANK) or cuda:N; empty: cuda where there is one, else the CPU"""
    num_writers: Count = 4
    """threads that encode and write images"""
    stall_s: Positive = 900.0
    """rank 0 gives up on another process that shows no sign of life for so many seconds, or ten times as long writes
    nothing"""
    grid: Natural = 64
    """images in the picture grid out/grid.png; 0: none"""
    show_stages: bool = False
    """also draw out/stages.png: semantics and texture along the three stages"""
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", parse_labels(self.labels))
        super().__post_init__()
        with_settings(SamplerConfig(), GuidanceConfig(), self.settings, mode="cfg")  # contradictions, before any work

    @property
    def settings(self) -> dict[str, object]:
        """Those that replace the pipeline's own; None: not given."""
        return {name: getattr(self, name) for name in SETTINGS}


def parse_labels(labels: str | Sequence[int | str]) -> tuple[int | str, ...]:
    """("golden retriever", "207") of the command line's "golden retriever,207"; (1, 2) of a YAML file's [1, 2].

    Raises ValueError for what is neither name nor whole number.
    """
    if isinstance(labels, str):
        text = labels.strip("[]() ")
        words = text.split(",") if re.search(r"[^\d\s,]", text) else text.replace(",", " ").split()
        labels = [word.strip(" '\"") for word in words if word.strip(" '\"")]
    if not all(isinstance(word, str | numbers.Integral) and not isinstance(word, bool) for word in labels):
        raise ValueError(f"labels '{labels}' must be numbers or names of classes, separated by commas")
    return tuple(word if isinstance(word, str) else int(word) for word in labels)


@dataclass(frozen=True)
class SampleResult:
    """What a process did: images it made itself, its time, and where the whole is (npz on rank 0 only)."""

    out: Path
    num_made: int
    seconds: float
    npz: Path | None = None


def run_sample(config: SampleConfig) -> SampleResult:
    """Generates this process's share; rank 0 then waits for all, gathers the npz and draws the grid.

    Raises ValueError for bad settings, or where `out` holds samples of other ones; OSError where it cannot be written,
    another command works there or another process has stopped.
    """
    from sfd_fast.sampling.output import occupied

    require(bool(config.model), "model is empty; give a pipeline folder, for example --model runs/demo/model")
    ranks, out = Ranks.read(), Path(config.out)  # processes never meet
    with occupied(out, ranks.rank, config.stall_s):
        generation = prepared(config, load_pipeline(config, ranks))
        if ranks.first:
            say_untrained(generation.pipeline, generation.pipeline.get_label_ids(config.labels))
            say_unused_guide(generation.pipeline, generation.request.guidance)
        generation.claim()
        start = time.monotonic()
        made, by_all = generation.run(
            ranks, num_writers=config.num_writers, stall_s=config.stall_s, progress=config.progress
        )
        npz = finish(config, generation, by_all, start) if ranks.first else None
        return SampleResult(out, made, time.monotonic() - start, npz)


def prepared(config: SampleConfig, pipeline: "SFDPipeline") -> "Generation":
    """What is to be drawn: the pipeline's settings with those of the command put in, and labels for every image."""
    from sfd_fast.sampling.large_scale import Generation, balanced_labels
    from sfd_fast.sampling.output import SampleFiles

    count, num_classes = config.num_images or len(config.labels) or 64, pipeline.config.num_classes
    drawn = pipeline.get_label_ids(config.labels) or pipeline.classes or range(num_classes)
    request = pipeline.request(balanced_labels(count, drawn), seed=config.seed, **config.settings)
    files = SampleFiles(Path(config.out), config.format, count, pipeline.micro_batch_size)
    return Generation(pipeline, request, files, config.shuffle_seed, config.model)


def finish(config: SampleConfig, generation: "Generation", num_drawn: int, start: float) -> Path | None:
    """What rank 0 does when all images are there: draws pictures, gathers the npz, reports."""
    files, drawn = generation.files, []
    if config.grid:
        drawn.append(draw_grid(generation, config.grid))
    npz = files.gather(generation.request.labels, config.shuffle_seed)
    if config.show_stages:
        drawn.append(draw_stages(generation))
    if num_drawn:
        seconds = time.monotonic() - start
        print(f"{num_drawn} images in {seconds:.1f} s ({num_drawn / seconds:.2f} images/s on all processes)")
    print("look at " + ", ".join(str(path) for path in [npz or files.folder, *drawn]))
    return npz


def draw_grid(generation: "Generation", count: int) -> Path:
    """grid.png of the first images, as long as they are not in the npz."""
    from sfd_fast.sampling.image_writer import is_whole
    from sfd_fast.sampling.output import GRID

    files = generation.files
    path, count = files.out / GRID, min(count, files.num)
    if not is_whole(path) and not files.gathered:
        pictures.save(path, pictures.square_grid(files.first_images(count)))
    return path


def draw_stages(generation: "Generation") -> Path:
    """stages.png: how the first images come about."""
    from sfd_fast.sampling.output import STAGES

    pipeline, request, path = generation.pipeline, generation.request, generation.files.out / STAGES
    labels = request.labels[: min(STRIP_IMAGES, pipeline.micro_batch_size)]
    frames = pipeline.trajectory(
        labels, num_frames=STRIP_FRAMES, seed=request.seed, sampler=request.sampler, guidance=request.guidance
    )
    pictures.stage_strip(
        path,
        [frame.tau for frame in frames],
        [frame.semantic for frame in frames],
        [frame.images for frame in frames],
        labels.tolist(),
        pipeline.delta_t,
    )
    return path


def load_pipeline(config: SampleConfig, ranks: Ranks) -> "SFDPipeline":
    from sfd_fast.sampling.latents import DTYPES
    from sfd_fast.sampling.pipeline import SFDPipeline

    options = {
        "torch_dtype": DTYPES.get(config.precision), "backend": config.backend, "device": ranks.device(config.device),
    }  # fmt: skip
    if config.micro_batch_size:
        options["micro_batch_size"] = config.micro_batch_size
    if config.delta_t is not None:
        options["delta_t"] = config.delta_t
    return SFDPipeline.from_pretrained(
        config.model, guide=config.guide or None, texture_codec=config.texture_codec or None, **options
    )


def say_untrained(pipeline: "SFDPipeline", given: list[int]) -> None:
    """One line where the model has classes that its training never showed it."""
    if pipeline.classes is None:
        return
    untrained = sorted(set(given) - set(pipeline.classes))
    seen = f"the model was trained on {len(pipeline.classes)} of its {pipeline.config.num_classes} classes"
    if untrained:
        print(
            f"{seen}: labels {', '.join(map(str, untrained[:5]))}{' ...' if untrained[5:] else ''} are not among them"
        )
    elif not given:
        print(f"{seen}: images are drawn of these")


def say_unused_guide(pipeline: "SFDPipeline", guidance: GuidanceConfig) -> None:
    """One line where a guide network is loaded that these settings never run."""
    if pipeline.guide is None or (guidance.mode == "autoguidance" and guidance.active):
        return
    why = "guidance is off" if not guidance.active else f"guidance mode is {guidance.mode}"
    print(f"the guide is not used, as {why}: --guidance_mode autoguidance --guidance_scale 1.5 would use it")
