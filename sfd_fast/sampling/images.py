"""Images of checked requests, micro-batch by micro-batch: latents drawn, decoded, and brought to the host.

The network always runs at one fixed micro-batch, padded where fewer images are wanted: results of one batch size do not
depend on a sample's place or company in the batch, results of two sizes differ in the last bits.
Letters: N images, B micro-batch, C channels, H height, W width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sfd_fast.config import GuidanceConfig, SamplerConfig, require, with_settings
from sfd_fast.diffusion.transport import split_latents
from sfd_fast.sampling.class_names import ClassNames, Labels
from sfd_fast.sampling.frames import Frame, spread
from sfd_fast.sampling.inputs import Integers, checked_ids, checked_labels, checked_noise, checked_seed, whole_numbers
from sfd_fast.sampling.pipeline_output import Form, Steps, formed
from sfd_fast.sampling.placement import PlacedSampler
from sfd_fast.sampling.sampler import check_settings
from sfd_fast.sampling.solvers import stage_borders


@dataclass(frozen=True)
class Request:
    """What a call draws, checked: classes and ids (N,) on the CPU, noise (N, C, H, W) where the caller gave it."""

    labels: Tensor
    sample_ids: Tensor
    seed: int
    sampler: SamplerConfig
    guidance: GuidanceConfig
    noise: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: slice | Tensor) -> "Request":
        noise = None if self.noise is None else self.noise[chosen]
        return Request(self.labels[chosen], self.sample_ids[chosen], self.seed, self.sampler, self.guidance, noise)


@dataclass(frozen=True)
class Drawn:
    """Results of a micro-batch, on their way to the host or to stay on the device."""

    request: Request
    finite: Tensor
    values: Tensor
    copied: torch.cuda.Event | None = None

    def collect(self, form: Form) -> np.ndarray | Tensor:
        """The values when they are there. Raises ValueError naming a sample that is not finite."""
        if self.copied is not None:
            self.copied.synchronize()
        bad = ~self.finite.cpu()
        if bad.any():
            raise ValueError(
                f"sample {self.request.sample_ids[bad][0].item()} (label {self.request.labels[bad][0].item()}) is not "
                "finite: lower the guidance scale, or sample in fp32"
            )
        return self.values if form in ("pt", "latent") else self.values.numpy()


class ImageSampler(PlacedSampler):
    """What a pipeline draws, without its files and its callers' habits."""

    micro_batch_size: int
    sampler: SamplerConfig
    guidance: GuidanceConfig
    id2label: dict[int, str] | None

    @property
    def image_size(self) -> int:
        return self.config.grid_size * self.texture_codec.downsampling

    def request(
        self,
        class_labels: Labels,
        *,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        sample_ids: Integers | None = None,
        latents: Tensor | None = None,
        sampler: SamplerConfig | None = None,
        guidance: GuidanceConfig | None = None,
        **settings: object,
    ) -> Request:
        """A call's arguments, checked. Raises ValueError for what the pipeline cannot draw."""
        (repeats,) = whole_numbers(num_images_per_prompt, "num_images_per_prompt").tolist()
        require(repeats >= 1, f"num_images_per_prompt {repeats} must be at least 1")
        labels = checked_labels(ClassNames(self.id2label).numbers(class_labels), self.config.num_classes)
        labels = labels.repeat_interleave(repeats)
        require(
            latents is None or sample_ids is None,
            "latents are noise of your own, and sample_ids choose ours: give one of the two",
        )
        ids, noise = checked_ids(sample_ids, len(labels)), None
        if latents is not None:
            noise = checked_noise(latents, (len(labels), *self.latent_shape))
        return Request(labels, ids, checked_seed(seed), *self.resolve(sampler, guidance, **settings), noise)

    def resolve(
        self, sampler: SamplerConfig | None = None, guidance: GuidanceConfig | None = None, **settings: object
    ) -> tuple[SamplerConfig, GuidanceConfig]:
        """The pipeline's sampler and guidance settings with a call's put in; ValueError where they contradict."""
        mode = "cfg" if self.guide is None else "autoguidance"
        sampler, guidance = with_settings(sampler or self.sampler, guidance or self.guidance, settings, mode=mode)
        require(
            guidance.mode != "autoguidance" or not guidance.active or self.guide is not None,
            "guidance mode 'autoguidance' needs a guide model, which this pipeline has not: load one with guide=... "
            "(`sfd sample --guide`), or use mode 'cfg' or 'none' (--guidance_mode)",
        )
        check_settings(sampler, guidance, self.config, self.delta_t)
        return sampler, guidance

    def generate(
        self,
        request: Request,
        *,
        form: Form = "uint8",
        steps: Steps | None = None,
        micro_batch_size: int | None = None,
    ) -> Iterator[np.ndarray | Tensor]:
        """Images of a request, micro-batch by micro-batch, at most B each, in the given form.

        On CUDA the next micro-batch is queued before the last one is waited for, so the device never idles.
        Raises ValueError where a sample is not finite.
        """
        size = micro_batch_size or self.micro_batch_size
        with self.using():
            drawn: Iterable[Drawn] = self._latents(request, size, steps)
            if self.offloads:  # all latents first: the networks leave before the codec comes
                drawn = list(drawn)
            waiting: Drawn | None = None
            for latents in drawn:
                launched = latents if form == "latent" else self._decoded(latents, size, form)
                if waiting is not None:
                    yield waiting.collect(form)
                waiting = launched
            if waiting is not None:
                yield waiting.collect(form)

    def _latents(self, request: Request, size: int, steps: Steps | None) -> Iterator[Drawn]:
        self.use("networks")
        for first in range(0, len(request), size):
            part = request.rows(slice(first, first + size))
            count = len(part)
            after = None if steps is None else steps.of(part.labels, part.sample_ids)
            noise = self.initial_noise(part.sample_ids, part.seed) if part.noise is None else part.noise
            latents = self.sample_latents(
                padded(part.labels, size), padded(noise, size), part.sampler, part.guidance, after
            )[:count]
            yield Drawn(part, latents.flatten(1).isfinite().all(dim=1), latents)

    def _decoded(self, drawn: Drawn, size: int, form: Form) -> Drawn:
        values = formed(self.decoded(padded(drawn.values, size)), form)[: len(drawn.values)]
        if self.device.type != "cuda" or form == "pt":
            return Drawn(drawn.request, drawn.finite, values if form == "pt" else values.cpu())
        on_host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (drawn.finite, values)]
        for target, value in zip(on_host, (drawn.finite, values)):
            target.copy_(value, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Drawn(drawn.request, *on_host, copied)

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Images of composite latents (B, C, H, W), of which only texture is decoded: (B, 3, H, W), about [-1, 1]."""
        self.use("texture_codec")
        texture, _ = split_latents(latents.to(self.device), self.config)
        return self.texture_codec.decode(self.statistics.denormalize_texture(texture))

    def num_steps(self, request: Request, micro_batch_size: int | None = None) -> int:
        """How often the solver calls back for a request."""
        batches = -(-len(request) // (micro_batch_size or self.micro_batch_size))
        each = request.sampler.num_inference_steps
        if request.sampler.solver == "dopri5":
            each = 1 if request.sampler.grid == "released" else len(stage_borders(self.delta_t)) - 1
        return batches * each

    def trajectory(
        self,
        class_labels: Labels,
        *,
        num_frames: int = 10,
        seed: int = 0,
        sample_ids: Integers | None = None,
        sampler: SamplerConfig | None = None,
        guidance: GuidanceConfig | None = None,
        **settings: object,
    ) -> list[Frame]:
        """Moments of one micro-batch's way from noise to images, for a picture of the three stages.

        At most num_frames + 2 moments: evenly spread ones among the solver's steps, and the stage borders always.
        class_labels: at most one micro-batch.  Other arguments as a call's.  Raises ValueError for more.
        """
        request = self.request(
            class_labels, seed=seed, sample_ids=sample_ids, sampler=sampler, guidance=guidance, **settings
        )
        count, size = len(request), self.micro_batch_size
        require(1 <= count <= size, f"a trajectory shows 1 to micro_batch_size = {size} samples, not {count}")
        with self.using():
            noise = self.initial_noise(request.sample_ids, request.seed)
            states: list[tuple[float, Tensor]] = [(0.0, noise)]

            def keep(step: int, tau: float, x: Tensor) -> None:
                states.append((tau, x[:count].clone()))

            self.use("networks")
            self.sample_latents(
                padded(request.labels, size), padded(noise, size), request.sampler, request.guidance, keep
            )
            return [self._frame(tau, state) for tau, state in spread(states, num_frames, self.delta_t)]

    def _frame(self, tau: float, state: Tensor) -> Frame:
        _, semantic = split_latents(state, self.config)
        images = formed(self.decoded(padded(state, self.micro_batch_size)), "uint8")[: len(state)]
        return Frame(tau, semantic.float().cpu().numpy(), images.cpu().numpy())

    def micro_batch_difference(
        self, class_labels: Labels, sizes: tuple[int, int] = (1, 32), **arguments: object
    ) -> dict[str, float]:
        """How much images depend on the micro-batch size, the one thing they do depend on.

        arguments: of `request`. Returns {"share": of the values 0 to 255 that differ, "largest": difference in levels}.
        """
        request = self.request(class_labels, **arguments)
        one, other = (
            np.concatenate(list(self.generate(request, micro_batch_size=size))).astype(np.int16) for size in sizes
        )
        difference = np.abs(one - other)
        return {"share": float((difference > 0).mean()), "largest": int(difference.max(initial=0))}


def padded(values: Tensor, size: int) -> Tensor:
    """(N, ...) with zeros up to (size, ...)."""
    return nn.functional.pad(values, (0, 0) * (values.dim() - 1) + (0, size - len(values)))
