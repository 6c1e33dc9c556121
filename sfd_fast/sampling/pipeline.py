"""SFDPipeline: labels in, images out, each a function of (seed, sample id, label) and of nothing else.

The network always runs at one fixed micro-batch, padded where fewer images are wanted: results of one batch size do not
depend on a sample's place or company in the batch, results of two sizes differ in the last bits.
Letters: B micro-batch, C channels, H height, W width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sfd_fast.config import (
    GuidanceConfig,
    SamplerConfig,
    SamplingBackend,
    SamplingPrecision,
    SFDConfig,
    require,
    with_settings,
)
from sfd_fast.config.checks import one_of
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.diffusion.transport import split_latents
from sfd_fast.files.tensors import require_finite
from sfd_fast.models.texture import to_uint8
from sfd_fast.sampling.frames import Frame, spread
from sfd_fast.sampling.inputs import Integers, checked_classes, checked_inputs
from sfd_fast.sampling.latents import LatentSampler, own_copy
from sfd_fast.sampling.pipeline_folder import PipelineSettings, check_parts, load_parts, save_parts
from sfd_fast.sampling.sampler import check_settings
from sfd_fast.sampling.sources import local_folder

DEFAULT_MICRO_BATCH = 32


@dataclass
class PipelineOutput:
    """What a call returns: images in the order of the labels, with the ids their noise came from."""

    images: list[Image.Image] | np.ndarray
    labels: Tensor
    sample_ids: Tensor


@dataclass
class _Batch:
    """Images on their way to the host."""

    images: Tensor
    finite: Tensor
    labels: Tensor
    sample_ids: Tensor
    copied: torch.cuda.Event | None

    def collect(self) -> np.ndarray:
        if self.copied is not None:
            self.copied.synchronize()
        if not self.finite.all():
            bad = ~self.finite
            raise ValueError(
                f"sample {self.sample_ids[bad][0].item()} (label {self.labels[bad][0].item()}) is not finite: lower "
                "the guidance scale, or sample in fp32"
            )
        return self.images.numpy()


class SFDPipeline(LatentSampler):
    """Two-clock diffusion transformer, optional guide, texture codec and the statistics of their latents.

    pipeline = SFDPipeline.from_pretrained(folder_or_hub_id)
    image = pipeline([207], num_steps=50, guidance_scale=1.5, seed=0).images[0]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        statistics: LatentStatistics,
        codec: nn.Module,
        delta_t: float,
        guide: nn.Module | None = None,
        sampler: SamplerConfig | None = None,
        guidance: GuidanceConfig | None = None,
        micro_batch_size: int = DEFAULT_MICRO_BATCH,
        precision: SamplingPrecision = "auto",
        backend: SamplingBackend = "auto",
        device: torch.device | str | None = None,
        training: SFDConfig | None = None,
        classes: Sequence[int] | None = None,
        keep_memory: bool = True,
    ) -> None:
        """model, guide: LightningDiT; codec: TextureCodec or IdentityCodec; delta_t: of the model's training.

        sampler, guidance: defaults of every call. precision bf16 holds the networks' weights in bf16; the state stays
        fp32; backend: eager, compile or cuda_graph; auto: bf16 and cuda_graph on CUDA, else fp32 and eager.
        device: default cuda where there is one. training: config of the model's training, saved along with it.
        classes: those that the model has seen in training, where they are not all.
        keep_memory: on a CPU, freed memory stays in the process from now on (allocator.py), which spares page faults.
        The given networks and codec stay as they are; the pipeline's copies share their weights where they can.
        Raises ValueError where the parts do not fit together or weights are not finite.
        """
        require(micro_batch_size >= 1, f"micro_batch_size {micro_batch_size} must be at least 1")
        check_parts(model.config, statistics, codec, delta_t, None if guide is None else guide.config)
        require_finite(codec.state_dict(), "the texture codec")
        super().__init__(
            model, guide, delta_t, precision=precision, backend=backend, device=device, keep_memory=keep_memory
        )
        self.codec = own_copy(codec, self.device)
        self.statistics = statistics.to(self.device)
        self.micro_batch_size, self.training = micro_batch_size, training
        self.classes = None if classes is None else checked_classes(classes, self.config.num_classes)
        self.sampler = sampler or SamplerConfig()
        self.guidance = guidance or GuidanceConfig()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        guide: str | Path | None = None,
        codec: str | Path | nn.Module | None = None,
        statistics: LatentStatistics | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **options,
    ) -> "SFDPipeline":
        """The pipeline of a folder that save_pretrained wrote, or of that name on the Hugging Face hub ("owner/name").

        source may also be a single network: a folder that training or `sfd convert` wrote, with guide (another such
        folder) and codec (a folder or released file of a texture codec, or a codec). statistics: of the training
        latents, where the folder holds none. variant: which of the authors' models, for "SFD-Project/SFD": xl-80ep,
        xl-800ep, xxl-80ep or xxl-800ep. revision, token: as huggingface_hub takes them; cache_dir: where fetched files
        are kept. options: micro_batch_size, precision, backend, device, sampler, guidance.
        Raises FileNotFoundError, or ValueError where parts are damaged or of another data set.
        """
        folder = local_folder(source, variant=variant, revision=revision, token=token, cache_dir=cache_dir)
        return cls(**load_parts(folder, guide, codec, statistics) | options)

    def __call__(
        self,
        labels: Integers,
        *,
        seed: int = 0,
        sample_ids: Integers | None = None,
        sampler: SamplerConfig | None = None,
        guidance: GuidanceConfig | None = None,
        output_type: Literal["pil", "np"] = "pil",
        progress: bool = False,
        **settings: object,
    ) -> PipelineOutput:
        """One image per label.

        sample_ids (default 0, 1, ...) choose each image's noise, with the seed: the same (seed, sample id, label) is
        the same image to the bit, in whatever order and company. settings: single ones instead of the pipeline's own,
        by the names of `sfd sample`: num_steps, solver, timestep_shift, time_grid, atol, rtol, guidance_scale (of
        AutoGuidance where the pipeline has a guide, else of CFG), guidance_mode, texture_scale, semantic_scale,
        interval_start, interval_mode. sampler and guidance replace all of the pipeline's before single ones do.
        Returns images as PIL, or with output_type "np" as one (N, H, W, 3) uint8 array.
        Raises ValueError for labels that are no classes of the model, and settings that do not exist or contradict.
        """
        one_of("output_type", output_type, ("pil", "np"))
        labels, ids, seed = self.checked_inputs(labels, sample_ids, seed)
        chosen = self.resolve(sampler, guidance, **settings)
        parts = []
        bar = _progress(len(labels), progress)
        for part in self.generate(labels, ids, seed, *chosen):
            parts.append(part)
            bar.update(len(part))
        bar.close()
        size = self.image_size
        images = np.concatenate(parts) if parts else np.zeros((0, size, size, 3), np.uint8)
        if output_type == "pil":
            images = [Image.fromarray(image) for image in images]
        return PipelineOutput(images, labels, ids)

    @property
    def image_size(self) -> int:
        return self.config.grid_size * self.codec.downsampling

    def checked_inputs(self, labels: Integers, sample_ids: Integers | None, seed: int) -> tuple[Tensor, Tensor, int]:
        """Labels and sample ids as (N,) int64 tensors, and the seed; ValueError for what the model cannot draw."""
        return checked_inputs(labels, sample_ids, seed, self.config.num_classes)

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

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of composite latents (B, C, H, W): only texture is decoded.  Returns (B, H, W, 3) uint8."""
        texture, _ = split_latents(latents, self.config)
        return to_uint8(self.codec.decode(self.statistics.denormalize_texture(texture)))

    def generate(
        self,
        labels: Tensor,
        sample_ids: Tensor,
        seed: int,
        sampler: SamplerConfig,
        guidance: GuidanceConfig,
        micro_batch_size: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Images of checked labels and ids, micro-batch by micro-batch: (at most B, H, W, 3) uint8.

        On CUDA the next micro-batch is queued before the last one is waited for, so the device never idles.
        Raises ValueError where a sample is not finite.
        """
        size = micro_batch_size or self.micro_batch_size
        queued: _Batch | None = None
        for part, ids in zip(labels.split(size), sample_ids.split(size)):
            if len(part) == 0:
                return
            launched = self._launch(part, ids, size, seed, sampler, guidance)
            if queued is not None:
                yield queued.collect()
            queued = launched
        if queued is not None:
            yield queued.collect()

    def _launch(
        self, labels: Tensor, ids: Tensor, size: int, seed: int, sampler: SamplerConfig, guidance: GuidanceConfig
    ) -> "_Batch":
        count = len(labels)
        latents = self.sample_latents(_padded(labels, size), _padded(ids, size), seed, sampler, guidance)
        finite = latents[:count].flatten(1).isfinite().all(dim=1)
        images = self.decode(latents)[:count]
        if self.device.type != "cuda":
            return _Batch(images, finite, labels, ids, None)
        on_host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (images, finite)]
        for target, value in zip(on_host, (images, finite)):
            target.copy_(value, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return _Batch(*on_host, labels, ids, copied)

    def trajectory(
        self,
        labels: Integers,
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
        labels: at most one micro-batch.  Other arguments as a call's.  Raises ValueError for more.
        """
        labels, ids, seed = self.checked_inputs(labels, sample_ids, seed)
        chosen = self.resolve(sampler, guidance, **settings)
        count, size = len(labels), self.micro_batch_size
        require(1 <= count <= size, f"a trajectory shows 1 to micro_batch_size = {size} samples, not {count}")
        states: list[tuple[float, Tensor]] = [(0.0, self.initial_noise(ids, seed))]
        self.sample_latents(
            _padded(labels, size),
            _padded(ids, size),
            seed,
            *chosen,
            callback=lambda step, tau, x: states.append((tau, x[:count].clone())),
        )
        return [self._frame(tau, state) for tau, state in spread(states, num_frames, self.delta_t)]

    def _frame(self, tau: float, state: Tensor) -> Frame:
        _, semantic = split_latents(state, self.config)
        images = self.decode(_padded(state, self.micro_batch_size))[: len(state)]
        return Frame(tau, semantic.float().cpu().numpy(), images.cpu().numpy())

    def micro_batch_difference(
        self,
        labels: Integers,
        sizes: tuple[int, int] = (1, 32),
        *,
        seed: int = 0,
        sample_ids: Integers | None = None,
        **settings: object,
    ) -> dict[str, float]:
        """How much images depend on the micro-batch size, the one thing they do depend on.

        Returns {"share": of the values 0 to 255 that differ, "largest": difference in levels}.
        """
        inputs = *self.checked_inputs(labels, sample_ids, seed), *self.resolve(**settings)
        one, other = (np.concatenate(list(self.generate(*inputs, size))).astype(np.int16) for size in sizes)
        difference = np.abs(one - other)
        return {"share": float((difference > 0).mean()), "largest": int(difference.max(initial=0))}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the pipeline as a folder that from_pretrained reads.

        Raises ValueError where the weights have been cast to bf16, OSError where the place cannot be written.
        """
        require(
            self.precision == "fp32",
            "a pipeline in bf16 has lost bits of its weights: load it with precision='fp32' to save it",
        )
        settings = PipelineSettings(
            self.delta_t,
            self.micro_batch_size,
            self.sampler,
            self.guidance,
            self.statistics.multiplier,
            self.classes,
        )
        statistics = self.statistics.to("cpu")
        save_parts(Path(folder), self.model, self.guide, self.codec, statistics, self.training, settings)


def _padded(values: Tensor, size: int) -> Tensor:
    """(N, ...) with zeros up to (size, ...)."""
    return nn.functional.pad(values, (0, 0) * (values.dim() - 1) + (0, size - len(values)))


def _progress(total: int, shown: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="image", disable=not shown)
