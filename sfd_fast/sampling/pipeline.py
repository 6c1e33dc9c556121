"""SFDPipeline: classes in, images out, with the names and habits of diffusers' pipelines.

Letters: N images, C channels, H height, W width.
"""

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfd_fast.config import GuidanceConfig, SamplerConfig, SamplingBackend, SFDConfig, require
from sfd_fast.config.checks import one_of
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.files.home import with_home
from sfd_fast.files.tensors import require_finite
from sfd_fast.formats.hub import push_folder
from sfd_fast.sampling.class_names import ClassNames, Labels, checked_id2label
from sfd_fast.sampling.images import ImageSampler
from sfd_fast.sampling.inputs import Integers, checked_classes
from sfd_fast.sampling.latents import own_copy
from sfd_fast.sampling.pipeline_folder import PipelineSettings, check_parts, load_parts, save_parts
from sfd_fast.sampling.pipeline_output import OutputType, PipelineOutput, StepEnd, Steps, formed, joined
from sfd_fast.sampling.sources import local_folder

DEFAULT_MICRO_BATCH = 32

log = logging.getLogger(__name__)


class SFDPipeline(ImageSampler):
    """Two-clock diffusion transformer, optional guide, texture codec and the statistics of their latents.

    pipeline = SFDPipeline.from_pretrained(folder_or_hub_id)
    image = pipeline("golden retriever", num_inference_steps=50, guidance_scale=1.5, seed=0).images[0]
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        texture_codec: nn.Module,
        statistics: LatentStatistics,
        delta_t: float,
        guide: nn.Module | None = None,
        sampler: SamplerConfig | None = None,
        guidance: GuidanceConfig | None = None,
        id2label: Mapping[int | str, str] | Sequence[str] | None = None,
        classes: Sequence[int] | None = None,
        training: SFDConfig | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: SamplingBackend = "auto",
        micro_batch_size: int = DEFAULT_MICRO_BATCH,
        keep_memory: bool = True,
    ) -> None:
        """transformer, guide: LightningDiT; texture_codec: TextureCodec or IdentityCodec; delta_t: of the training.

        sampler, guidance: defaults of every call. id2label: names of the classes. classes: those that the model has
        seen in training, where they are not all. training: its config, saved along with the model.
        torch_dtype: float32 or bfloat16, of the networks' weights; the state stays fp32. None: bfloat16 on devices
        that compute in it (most GPUs; CPUs with AMX or AVX512_BF16), else float32. device: default cuda where there is
        one. backend: eager, compile or cuda_graph; auto: cuda_graph on CUDA, else eager. keep_memory: on a CPU, freed
        memory stays in the process from now on (allocator.py), which spares page faults.
        The given networks and codec stay as they are; the pipeline's copies share their weights where they can.
        Raises ValueError where the parts do not fit together or weights are not finite.
        """
        require(micro_batch_size >= 1, f"micro_batch_size {micro_batch_size} must be at least 1")
        check_parts(transformer.config, statistics, texture_codec, delta_t, None if guide is None else guide.config)
        require_finite(texture_codec.state_dict(), "the texture codec")
        say_other_delta_t(delta_t, training)
        super().__init__(
            transformer, guide, delta_t, torch_dtype=torch_dtype, backend=backend, device=device,
            keep_memory=keep_memory,
        )  # fmt: skip
        self.texture_codec = own_copy(texture_codec, self.device)
        self.statistics = statistics.to(self.device)
        self.micro_batch_size, self.training = micro_batch_size, training
        self.classes = None if classes is None else checked_classes(classes, self.config.num_classes)
        self.id2label = checked_id2label(id2label, self.config.num_classes)
        self.sampler = sampler or SamplerConfig()
        self.guidance = guidance or GuidanceConfig()
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    @with_home
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        guide: str | Path | None = None,
        texture_codec: str | Path | nn.Module | None = None,
        statistics: LatentStatistics | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **options,
    ) -> "SFDPipeline":
        """The pipeline of a folder that save_pretrained wrote, or of that name on the Hugging Face hub ("owner/name").

        source may also be a run of `sfd train` or a single network: a folder that training or `sfd convert` wrote, with
        guide (another such folder) and texture_codec (a folder or released file, or a codec) where it names none.
        statistics: of the training latents, where the folder holds none. variant: which of the authors' models, for
        "SFD-Project/SFD": xl-80ep, xl-800ep, xxl-80ep or xxl-800ep. revision, token: as huggingface_hub takes them;
        cache_dir: where fetched files are kept. options: torch_dtype, device, backend, micro_batch_size, sampler,
        guidance, id2label, and delta_t to sample at another offset than that of the training.
        Raises FileNotFoundError, or ValueError where parts are damaged or of another data set.
        """
        folder = local_folder(source, variant=variant, revision=revision, token=token, cache_dir=cache_dir)
        return cls(**load_parts(folder, guide, texture_codec, statistics) | options)

    def __call__(
        self,
        class_labels: Labels,
        *,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        sample_ids: Integers | None = None,
        latents: Tensor | None = None,
        sampler: SamplerConfig | None = None,
        guidance: GuidanceConfig | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        generator: object = None,
        **settings: object,
    ) -> PipelineOutput | tuple:
        """num_images_per_prompt images of every class, by number or by name.

        sample_ids (default 0, 1, ...) choose each image's noise, with the seed: the same (seed, sample id, class) is
        the same image to the bit, in whatever order and company. latents (N, C, H, W): noise of your own instead.
        settings: single ones instead of the pipeline's own, by the names of `sfd sample`: num_inference_steps, solver,
        timestep_shift, time_grid, atol, rtol, guidance_scale (of AutoGuidance where the pipeline has a guide, else of
        CFG), guidance_mode, texture_scale, semantic_scale, interval_start, interval_mode. sampler and guidance replace
        all of the pipeline's before single ones do.
        output_type: pil; np, (N, H, W, 3) float in [0, 1]; pt, (N, 3, H, W) float in [0, 1]; latent, (N, C, H, W),
        which `decode` takes. return_dict=False returns (images,).
        callback_on_step_end(pipeline, step, tau, tensors) follows every step of the solver (of dopri5: every stage) for
        each micro-batch in turn; of a dictionary that it returns "latents" goes on. See pipeline_output.StepEnd.
        Raises ValueError for classes that the model has not, and settings that do not exist or contradict.
        """
        one_of("output_type", output_type, OutputType)
        require(
            generator is None,
            "generator is not taken: noise is a function of seed and sample_ids, so that an image is the same in any "
            "company; give seed=..., and sample_ids=... for other images of a class",
        )
        request = self.request(
            class_labels, num_images_per_prompt=num_images_per_prompt, seed=seed, sample_ids=sample_ids,
            latents=latents, sampler=sampler, guidance=guidance, **settings,
        )  # fmt: skip
        with self.progress_bar(total=self.num_steps(request)) as bar:
            steps = Steps(self, bar, callback_on_step_end, callback_on_step_end_tensor_inputs)
            parts = list(self.generate(request, form=output_type, steps=steps))
        size = self.image_size
        images = joined(parts, output_type, (0, *((3, size, size) if output_type != "latent" else self.latent_shape)))
        return PipelineOutput(images, request.labels, request.sample_ids) if return_dict else (images,)

    def decode(self, latents: Tensor, *, output_type: OutputType = "pil") -> Any:
        """Images of composite latents (N, C, H, W), as output_type "latent" or a callback gives them."""
        one_of("output_type", output_type, ("pil", "np", "pt"))
        with self.using(), torch.no_grad():
            images = formed(self.decoded(latents), output_type)
        return joined([images if output_type == "pt" else images.cpu().numpy()], output_type, ())

    @property
    def components(self) -> dict[str, Any]:
        """What the pipeline is made of: SFDPipeline(**pipeline.components) draws the same, and shares the weights."""
        names = ("transformer", "guide", "texture_codec", "statistics", "delta_t", "sampler", "guidance", "id2label",
                 "classes", "training")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def labels(self) -> dict[str, int]:
        """The class of every name that means one."""
        return ClassNames(self.id2label).labels

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The classes of names. Raises ValueError for a name that is none, or that several classes have."""
        return ClassNames(self.id2label).numbers(label)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for the bar of a call, for example disable=True."""
        self._progress_bar_config = options

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> Any:
        """A bar with the options of set_progress_bar_config."""
        from tqdm.auto import tqdm

        return tqdm(iterable, total=total, **({"unit": "step"} | self._progress_bar_config))

    @with_home
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the pipeline as a folder that from_pretrained reads.

        Raises ValueError where the weights have been cast to bf16, OSError where the place cannot be written.
        """
        require(
            not self.rounded,
            "a pipeline in bf16 has lost bits of its weights: load it with torch_dtype=torch.float32 to save it",
        )
        settings = PipelineSettings(
            self.delta_t, self.micro_batch_size, self.sampler, self.guidance, self.statistics.multiplier, self.classes
        )
        save_parts(
            Path(folder), self.transformer, self.guide, self.texture_codec, self.statistics.to("cpu"), self.training,
            settings, self.id2label,
        )  # fmt: skip

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload SFDPipeline",
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads what save_pretrained writes to the Hugging Face hub, as "owner/name"; the address of the commit.

        The repository is made where there is none. Raises as save_pretrained, and OSError where the hub refuses.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "pipeline")
            self.save_pretrained(folder)
            return push_folder(
                folder, repo_id, message=commit_message, private=private, token=token, create_pr=create_pr
            )


def say_other_delta_t(delta_t: float, training: SFDConfig | None) -> None:
    """A warning where a model is sampled at another offset than it was trained with."""
    trained = delta_t if training is None else training.transport.delta_t
    if delta_t != trained:
        log.warning(
            "sampling with delta_t %g: the model was trained with %g and has not seen other offsets of its two clocks",
            delta_t, trained,
        )  # fmt: skip
