"""SFDPipeline: labels in, images out, each a function of (seed, sample id, label) and of nothing else.

The network always runs at one fixed micro-batch, padded where fewer images are wanted: results of one batch size do not
depend on a sample's place or company in the batch, results of two sizes differ in the last bits.
Letters: B micro-batch, C channels, H height, W width.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sfd_fast.config import (
    GuidanceConfig,
    ModelConfig,
    Precision,
    SamplerConfig,
    SFDConfig,
    require,
    to_dict,
)
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.diffusion.transport import noise, split_latents
from sfd_fast.files.tensors import require_finite
from sfd_fast.models.texture import to_uint8
from sfd_fast.sampling.allocator import keep_freed_memory
from sfd_fast.sampling.guidance import Velocity, autoguidance, bind_labels, bind_null, cfg, check_scales
from sfd_fast.sampling.pipeline_folder import check_parts, load_parts, local_folder, save_parts
from sfd_fast.sampling.runner import Recent, StepRunners
from sfd_fast.sampling.sampler import guidance_table, sample
from sfd_fast.sampling.solvers import Callback, Plan, check_solver, make_plan, time_grid

DEFAULT_MICRO_BATCH = 32
BACKENDS = ("eager", "compile", "cuda_graph")
MAX_PLANS = 64  # kept settings of earlier calls

log = logging.getLogger(__name__)


@dataclass
class PipelineOutput:
    """What a call returns: images in the order of the labels, with the ids their noise came from."""

    images: list[Image.Image] | np.ndarray
    labels: Tensor
    sample_ids: Tensor


@dataclass(frozen=True)
class Frame:
    """One moment of a trajectory: normalised semantic latents (N, C, h, w) and decoded texture (N, H, W, 3) uint8."""

    tau: float
    semantic: np.ndarray
    images: np.ndarray


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


def integers(values: int | Sequence[int] | Tensor) -> Tensor:
    """A tensor of numbers, of a sequence of numbers (0-d tensors among them), or of a number."""
    if isinstance(values, Tensor | np.ndarray | int):
        return torch.as_tensor(values)
    return torch.as_tensor([value.item() if isinstance(value, Tensor) else value for value in values])


class SFDPipeline:
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
        precision: Precision = "fp32",
        backend: Literal["eager", "compile", "cuda_graph"] = "eager",
        device: torch.device | str | None = None,
        training: SFDConfig | None = None,
        keep_memory: bool = True,
    ) -> None:
        """model, guide: LightningDiT; codec: TextureCodec or IdentityCodec; delta_t: of the model's training.

        sampler, guidance: defaults of every call. precision bf16 holds the networks' weights in bf16; the state stays
        fp32. device: default cuda where there is one. training: config of the model's training, saved along with it.
        keep_memory: on a CPU, freed memory stays in the process from now on (memory.py), which spares page faults.
        Raises ValueError where the parts do not fit together or weights are not finite.
        """
        require(micro_batch_size >= 1, f"micro_batch_size {micro_batch_size} must be at least 1")
        require(precision in ("fp32", "bf16"), f"precision '{precision}' is unknown; choose fp32 or bf16")
        require(backend in BACKENDS, f"backend '{backend}' is unknown; choose one of {', '.join(BACKENDS)}")
        check_parts(model.config, statistics, codec, delta_t, None if guide is None else guide.config)
        for name, part in (("model", model), ("guide", guide), ("texture codec", codec)):
            if part is not None:
                require_finite(part.state_dict(), f"the {name}")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if keep_memory and self.device.type == "cpu":
            keep_freed_memory()
        self.precision, self.micro_batch_size = precision, micro_batch_size
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.model = model.eval().requires_grad_(False).to(self.device, dtype)
        self.guide = None if guide is None else guide.eval().requires_grad_(False).to(self.device, dtype)
        self.codec = codec.eval().requires_grad_(False).to(self.device)
        self.statistics = statistics.to(self.device)
        self.runners = StepRunners(backend, self.device)
        self._plans = Recent(MAX_PLANS)
        self._said_eager = False
        self.delta_t, self.training = delta_t, training
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
        **options,
    ) -> "SFDPipeline":
        """The pipeline of a folder that save_pretrained wrote, or of that name on the Hugging Face hub ("owner/name").

        source may also be a single network: a folder that training or `sfd convert` wrote, with guide (another such
        folder) and codec (a folder or released file of a texture codec, or a codec). statistics: of the training
        latents, where the folder holds none. options: micro_batch_size, precision, backend, device, sampler, guidance.
        Raises FileNotFoundError, or ValueError where parts are damaged or of another data set.
        """
        return cls(**load_parts(local_folder(source), guide, codec, statistics) | options)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def __call__(
        self,
        labels: int | Sequence[int] | Tensor,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        sample_ids: Sequence[int] | Tensor | None = None,
        solver: str | None = None,
        timestep_shift: float | None = None,
        sampler: SamplerConfig | None = None,
        guidance: GuidanceConfig | None = None,
        output_type: Literal["pil", "np"] = "pil",
        progress: bool = False,
    ) -> PipelineOutput:
        """One image per label.

        sample_ids (default 0, 1, ...) choose each image's noise, with the seed: the same (seed, sample id, label) is
        the same image to the bit, in whatever order and company. sampler replaces all of the pipeline's solver settings
        (grid and tolerances among them), before num_steps, solver and timestep_shift change single ones.
        guidance_scale sets the weight of the pipeline's guidance (AutoGuidance where it has a guide, else CFG);
        guidance replaces all of its settings.
        Returns images as PIL, or with output_type "np" as one (N, H, W, 3) uint8 array.
        Raises ValueError for labels that are no classes of the model, and settings that do not exist or contradict.
        """
        require(output_type in ("pil", "np"), f"output_type '{output_type}' is unknown; choose pil or np")
        labels, sample_ids = self.checked_inputs(labels, sample_ids, seed)
        settings = self.resolve(num_steps, guidance_scale, solver, timestep_shift, guidance, sampler)
        parts = []
        bar = _progress(len(labels), progress)
        for part in self.generate(labels, sample_ids, seed, *settings):
            parts.append(part)
            bar.update(len(part))
        bar.close()
        size = self.image_size
        images = np.concatenate(parts) if parts else np.zeros((0, size, size, 3), np.uint8)
        if output_type == "pil":
            images = [Image.fromarray(image) for image in images]
        return PipelineOutput(images, labels, sample_ids)

    @property
    def image_size(self) -> int:
        return self.config.grid_size * self.codec.downsampling

    def checked_inputs(
        self, labels: int | Sequence[int] | Tensor, sample_ids: Sequence[int] | Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Labels and sample ids as (N,) int64 tensors; ValueError for what the model cannot draw."""
        labels = torch.atleast_1d(integers(labels)).cpu()
        require(
            labels.dim() == 1 and (len(labels) == 0 or not labels.is_floating_point()),
            f"labels must be one-dimensional integers, not {labels.dtype} of shape {tuple(labels.shape)}",
        )
        labels = labels.long()
        outside = (labels < 0) | (labels >= self.config.num_classes)
        if outside.any():
            raise ValueError(
                f"label {labels[outside][0].item()} is out of range: this model has the classes 0 to "
                f"{self.config.num_classes - 1}"
            )
        ids = torch.arange(len(labels)) if sample_ids is None else integers(sample_ids).cpu().long()
        require(
            ids.shape == labels.shape,
            f"{len(labels)} labels but sample_ids of shape {tuple(ids.shape)}: give one id per label",
        )
        require(0 <= seed < 2**63, f"seed {seed} must be in [0, 2^63)")
        return labels, ids

    def resolve(
        self,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        timestep_shift: float | None = None,
        guidance: GuidanceConfig | None = None,
        sampler: SamplerConfig | None = None,
    ) -> tuple[SamplerConfig, GuidanceConfig]:
        """The pipeline's sampler and guidance settings with a call's put in; ValueError where they contradict."""
        changes = {"num_steps": num_steps, "solver": solver, "timestep_shift": timestep_shift}
        sampler = replace(sampler or self.sampler, **{k: v for k, v in changes.items() if v is not None})
        check_solver(sampler, self.delta_t)
        guidance = guidance or self.guidance
        if guidance_scale is not None:
            mode = guidance.mode
            if mode == "none" and guidance_scale != 1:
                mode = "cfg" if self.guide is None else "autoguidance"
            guidance = replace(guidance, mode=mode, scale=guidance_scale, texture_scale=None, semantic_scale=None)
        require(
            guidance.mode != "autoguidance" or not guidance.active or self.guide is not None,
            "guidance mode 'autoguidance' needs a guide model, which this pipeline has not: load one with guide=... "
            "(`sfd sample --guide`), or use mode 'cfg' or 'none' (--guidance_mode)",
        )
        check_scales(guidance, self.delta_t)
        return sampler, guidance

    def velocity(self, labels: Tensor, guidance: GuidanceConfig) -> Velocity:
        """The guided velocity function for labels (B,) on the pipeline's device; compiled under backend compile."""
        model, guide = self._timed(self.model), self._timed(self.guide)
        main = bind_labels(model, labels)
        common = {"num_texture_channels": self.config.texture_channels, "delta_t": self.delta_t}
        if guidance.mode == "autoguidance" and guidance.active:
            return autoguidance(main, bind_labels(guide, labels), guidance, **common)
        if guidance.mode == "cfg":
            return cfg(main, bind_null(model, labels, self.config.num_classes), guidance, **common)
        return main

    def _timed(self, model: nn.Module | None) -> Callable | None:
        """model(x, t_tex, t_sem, labels) for solvers that choose their times: all but the condition compiled."""
        if model is None or self.runners.backend != "compile":
            return model
        network = self.runners.network(model, self.micro_batch_size)
        return lambda x, t_tex, t_sem, labels: network(x, model.condition(t_tex, t_sem, labels))

    def initial_noise(self, sample_ids: Tensor, seed: int) -> Tensor:
        """x at tau = 0: (B, C, H, W) float32."""
        shape = (self.config.channels, self.config.grid_size, self.config.grid_size)
        return noise(self._on_device(sample_ids), shape, seed, random_numbers.SAMPLE_NOISE)

    def _on_device(self, values: Tensor) -> Tensor:
        """A copy that does not wait for what the device is still doing."""
        if self.device.type != "cuda" or values.device.type == "cuda":
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)

    @torch.no_grad()
    def sample_latents(
        self,
        labels: Tensor,
        sample_ids: Tensor,
        seed: int,
        sampler: SamplerConfig,
        guidance: GuidanceConfig,
        callback: Callback | None = None,
    ) -> Tensor:
        """Composite latents of one full micro-batch: labels, sample_ids (B,).

        The network's part of a fixed-step trajectory is allocation-free under backend cuda_graph (see graphs.py);
        noise and labels of each micro-batch come from PyTorch's allocator.
        Returns (B, C, H, W) float32, overwritten by the next call.
        """
        labels, x0 = self._on_device(labels), self.initial_noise(sample_ids, seed)
        if sampler.solver == "dopri5":
            self._say_eager()
            return sample(
                self.velocity(labels, guidance),
                x0,
                delta_t=self.delta_t,
                config=sampler,
                num_texture_channels=self.config.texture_channels,
                callback=callback,
            )
        plan, weights, needs_weak, grid = self._prepared(sampler, guidance)
        weak = weak_labels = None
        if any(needs_weak):
            null = guidance.mode == "cfg"
            weak = self.model if null else self.guide
            weak_labels = torch.full_like(labels, self.config.num_classes) if null else labels
        runner = self.runners.get(self.model, weak, self.micro_batch_size, plan)
        runner.load(plan, weights, self.delta_t, exact=sampler.grid == "released")
        return runner.run(x0, labels, weak_labels, needs_weak, grid, callback)

    def _prepared(
        self, sampler: SamplerConfig, guidance: GuidanceConfig
    ) -> tuple[Plan, Tensor, list[bool], list[float]]:
        """Plan, guidance weights, where the weak network is needed, and time grid of these settings; kept."""

        def make() -> tuple[Plan, Tensor, list[bool], list[float]]:
            plan = make_plan(sampler, self.delta_t)
            return plan, *guidance_table(plan, guidance, self.delta_t), time_grid(sampler, self.delta_t).tolist()

        return self._plans.get((sampler, guidance), make)

    def _say_eager(self) -> None:
        if self.runners.backend == "cuda_graph" and not self._said_eager:
            self._said_eager = True
            log.warning(
                "solver dopri5 chooses its steps on the host, so backend cuda_graph does not apply and its networks "
                "run eagerly: use backend compile, or a solver with fixed steps (%s)",
                SamplerConfig().solver,
            )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of composite latents (B, C, H, W): only texture is decoded.  Returns (B, H, W, 3) uint8."""
        texture, _ = split_latents(latents, self.config)
        return to_uint8(self.codec.decode(self.statistics.denormalize_texture(texture)))

    def generate(
        self, labels: Tensor, sample_ids: Tensor, seed: int, sampler: SamplerConfig, guidance: GuidanceConfig
    ) -> Iterator[np.ndarray]:
        """Images of checked labels and ids, micro-batch by micro-batch: (at most B, H, W, 3) uint8.

        On CUDA the next micro-batch is queued before the last one is waited for, so the device never idles.
        Raises ValueError where a sample is not finite.
        """
        queued: _Batch | None = None
        for part, ids in zip(labels.split(self.micro_batch_size), sample_ids.split(self.micro_batch_size)):
            if len(part) == 0:
                return
            launched = self._launch(part, ids, seed, sampler, guidance)
            if queued is not None:
                yield queued.collect()
            queued = launched
        if queued is not None:
            yield queued.collect()

    def _launch(
        self, labels: Tensor, ids: Tensor, seed: int, sampler: SamplerConfig, guidance: GuidanceConfig
    ) -> "_Batch":
        count = len(labels)
        padding = (0, self.micro_batch_size - count)
        latents = self.sample_latents(
            nn.functional.pad(labels, padding), nn.functional.pad(ids, padding), seed, sampler, guidance
        )
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
        labels: int | Sequence[int] | Tensor,
        *,
        num_frames: int = 10,
        seed: int = 0,
        sample_ids: Sequence[int] | Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        timestep_shift: float | None = None,
        sampler: SamplerConfig | None = None,
        guidance: GuidanceConfig | None = None,
    ) -> list[Frame]:
        """Moments of one micro-batch's way from noise to images, for a picture of the three stages.

        At most num_frames + 2 moments: evenly spread ones among the solver's steps, and the stage borders always.
        labels: at most one micro-batch.  Raises ValueError for more.
        """
        labels, ids = self.checked_inputs(labels, sample_ids, seed)
        settings = self.resolve(num_steps, guidance_scale, solver, timestep_shift, guidance, sampler)
        return self.frames(labels, ids, seed, *settings, num_frames=num_frames)

    def frames(
        self,
        labels: Tensor,
        sample_ids: Tensor,
        seed: int,
        sampler: SamplerConfig,
        guidance: GuidanceConfig,
        *,
        num_frames: int,
    ) -> list[Frame]:
        """What trajectory returns, for checked labels and ids and resolved settings."""
        count = len(labels)
        require(
            1 <= count <= self.micro_batch_size,
            f"a trajectory shows 1 to micro_batch_size = {self.micro_batch_size} samples, not {count}",
        )
        padding = (0, self.micro_batch_size - count)
        states: list[tuple[float, Tensor]] = [(0.0, self.initial_noise(sample_ids, seed))]
        self.sample_latents(
            nn.functional.pad(labels, padding),
            nn.functional.pad(sample_ids, padding),
            seed,
            sampler,
            guidance,
            callback=lambda step, tau, x: states.append((tau, x[:count].clone())),
        )
        return [self._frame(tau, state, count) for tau, state in _spread(states, num_frames, self.delta_t)]

    def _frame(self, tau: float, state: Tensor, count: int) -> Frame:
        padded = nn.functional.pad(state, (0, 0, 0, 0, 0, 0, 0, self.micro_batch_size - count))
        _, semantic = split_latents(state, self.config)
        return Frame(tau, semantic.float().cpu().numpy(), self.decode(padded)[:count].cpu().numpy())

    def micro_batch_difference(
        self, labels: int | Sequence[int] | Tensor, sizes: tuple[int, int] = (1, 32), **options
    ) -> dict[str, float]:
        """How much images depend on the micro-batch size, the one thing they do depend on.

        Returns {"share": of the values 0 to 255 that differ, "largest": difference in levels}.
        """
        kept = self.micro_batch_size
        try:
            pair = []
            for size in sizes:
                self.micro_batch_size = size
                pair.append(self(labels, output_type="np", **options).images.astype(np.int16))
        finally:
            self.micro_batch_size = kept
        difference = np.abs(pair[0] - pair[1])
        return {"share": float((difference > 0).mean()), "largest": int(difference.max(initial=0))}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the pipeline as a folder that from_pretrained reads.

        Raises ValueError where the weights have been cast to bf16, OSError where the place cannot be written.
        """
        require(self.precision == "fp32", "a pipeline in bf16 has lost bits of its weights: save the fp32 one")
        save_parts(
            Path(folder),
            self.model,
            self.guide,
            self.codec,
            self.statistics.to("cpu"),
            self.training,
            delta_t=self.delta_t,
            sampler=to_dict(self.sampler),
            guidance=to_dict(self.guidance),
            micro_batch_size=self.micro_batch_size,
        )


def _spread(states: list[tuple[float, Tensor]], count: int, delta_t: float) -> list[tuple[float, Tensor]]:
    wanted = np.linspace(0, 1 + delta_t, max(count, 2)).tolist() + [delta_t, 1.0]
    nearest = {min(range(len(states)), key=lambda i: abs(states[i][0] - tau)) for tau in wanted}
    return [states[i] for i in sorted(nearest)]


def _progress(total: int, shown: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="image", disable=not shown)
