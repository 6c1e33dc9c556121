"""The models behind the page, and the trajectories that a click draws.

Letters: N images, H height, W width, C channels, h, w of latents.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch

from sfd_fast import pictures
from sfd_fast.app.choice import Choice, Origin, absolute, number, whole
from sfd_fast.config import GuidanceConfig, SamplerConfig, SamplingPrecision, require
from sfd_fast.files.home import with_home
from sfd_fast.sampling.class_names import shown_names
from sfd_fast.sampling.latents import DTYPES
from sfd_fast.sampling.pipeline import SFDPipeline

NUM_MOMENTS = 20
"""moments of a trajectory that the scrubber shows, besides the borders of the stages"""
MAX_STEPS = 1000
SOLVERS: tuple[str, ...] = get_args(get_type_hints(SamplerConfig)["solver"])


@dataclass(frozen=True)
class Moment:
    """One moment of all images: colours of the semantic latents (N, h, w, 3) and textures (N, H, W, 3), uint8."""

    tau: float
    semantic: np.ndarray
    texture: np.ndarray


@dataclass(frozen=True)
class Track:
    """The way of one model's images from noise to data, in time order."""

    title: str
    delta_t: float
    moments: list[Moment]

    def at(self, share: float) -> Moment:
        """The moment nearest to a share (0 noise, 1 data) of the whole way."""
        return min(self.moments, key=lambda moment: abs(moment.tau - share * (1 + self.delta_t)))


class Studio:
    """A pipeline, and where one is given its synchronous twin: another model of the same latents and classes.

    batch: images of one click at most, which is also the micro-batch. Raises ValueError where model and twin are not
    of one system, and as SFDPipeline.from_pretrained does.
    """

    def __init__(
        self,
        model: str,
        *,
        twin: str = "",
        guide: str = "",
        texture_codec: str = "",
        batch: int = 16,
        precision: SamplingPrecision = "auto",
        device: str = "",
    ) -> None:
        options = {
            "texture_codec": texture_codec or None, "micro_batch_size": batch, "torch_dtype": DTYPES.get(precision),
            "device": device or None,
        }  # fmt: skip
        self.name = model
        self.pipeline = SFDPipeline.from_pretrained(model, guide=guide or None, **options)
        names = shown_names(self.pipeline.id2label, self.pipeline.config.num_classes)
        self.names = [f"{name} ({i})" if i in (self.pipeline.id2label or {}) else name for i, name in enumerate(names)]
        self.origin = Origin(
            absolute(model), absolute(guide), absolute(texture_codec), batch, self.pipeline.precision,
            str(self.pipeline.device),
        )  # fmt: skip
        self.twin = None
        if twin:
            self.twin = SFDPipeline.from_pretrained(twin, **options)
            require_same_latents(self.pipeline, self.twin, twin)

    @property
    def guidance_modes(self) -> list[Literal["none", "cfg", "autoguidance"]]:
        """Modes that this pipeline can draw with."""
        guided = ["autoguidance"] if self.pipeline.guide is not None else []
        return ["none", "cfg", *guided]

    def chosen(
        self,
        labels: list[int],
        num_images: object,
        seed: object,
        solver: str,
        num_inference_steps: object,
        mode: str,
        apart: bool,
        scales: tuple[object, object, object],
    ) -> Choice:
        """The page's fields as a Choice. labels: classes in turn; apart: scales for texture and semantics differ.

        scales: (common, texture, semantic). Raises ValueError in words for whoever filled in the page.
        """
        require(bool(labels), "no class is chosen: choose at least one")
        count, batch = whole(num_images, "the number of images"), self.pipeline.micro_batch_size
        require(1 <= count <= batch, f"the number of images is {count}: this page draws 1 to {batch} at once (--batch)")
        steps = whole(num_inference_steps, "the number of steps")
        require(1 <= steps <= MAX_STEPS, f"the number of steps is {steps}: give 1 to {MAX_STEPS}")
        guidance = replace(
            self.pipeline.guidance, mode="none", scale=1.0, texture_scale=None, semantic_scale=None
        )
        if mode != "none":
            common, texture, semantic = scales
            values = (texture, semantic) if apart else (common, common)
            both = [number(value, f"the {part} scale") for value, part in zip(values, ("texture", "semantic"))]
            changes = {"scale": both[0]} if both[0] == both[1] else dict(zip(("texture_scale", "semantic_scale"), both))
            guidance = replace(guidance, mode=mode, **changes)
        return Choice(
            tuple(labels[i % len(labels)] for i in range(count)), whole(seed, "the seed"), solver, steps, guidance
        )

    def draw(self, choice: Choice) -> list[Track]:
        """The trajectories of the pipeline's images and, where there is a twin, of the twin's from the same noise.

        Raises ValueError for what the pipeline refuses, and where the device has too little memory.
        """
        try:
            return self._tracks(choice)
        except torch.OutOfMemoryError as error:
            raise ValueError("the device has too little memory: start the page with a smaller --batch") from error

    def _tracks(self, choice: Choice) -> list[Track]:
        tracks = [track("semantics first" if self.pipeline.delta_t else "synchronous", self.pipeline, choice)]
        if self.twin is not None:
            guidance = twin_guidance(choice.guidance, self.twin)
            name = "synchronous" if self.twin.delta_t == 0 else f"twin, delta_t {self.twin.delta_t}"
            scale = f", guidance {guidance.mode} {guidance.scale:g}" if guidance != choice.guidance else ""
            tracks.append(track(name + scale, self.twin, replace(choice, guidance=guidance)))
        return tracks


def track(title: str, pipeline: SFDPipeline, choice: Choice) -> Track:
    frames = pipeline.trajectory(
        list(choice.labels), num_frames=NUM_MOMENTS, seed=choice.seed, num_inference_steps=choice.num_inference_steps,
        solver=choice.solver, guidance=choice.guidance,
    )  # fmt: skip
    last = frames[-1].semantic
    moments = [Moment(frame.tau, pictures.principal_colours(frame.semantic, last), frame.images) for frame in frames]
    return Track(title, pipeline.delta_t, moments)


def twin_guidance(guidance: GuidanceConfig, twin: SFDPipeline) -> GuidanceConfig:
    """The guidance that a twin can take: with one clock one scale, the texture's; without a guide none."""
    if guidance.mode == "autoguidance" and twin.guide is None:
        return GuidanceConfig()
    if twin.delta_t == 0:
        return replace(guidance, scale=guidance.scales[0], texture_scale=None, semantic_scale=None)
    return guidance


@with_home
def require_same_latents(pipeline: SFDPipeline, twin: SFDPipeline, folder: str | Path) -> None:
    for name in ("grid_size", "texture_channels", "semantic_channels", "num_classes"):
        ours, theirs = getattr(pipeline.config, name), getattr(twin.config, name)
        require(
            ours == theirs,
            f"the twin {folder} has {name} = {theirs}, the model {ours}: a twin is trained on the same latents and "
            "classes, so that both start from the same noise",
        )
