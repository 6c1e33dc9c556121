"""What a pipeline's call gives back, in the forms that diffusers has, and what follows every step of the solver.

Letters: N images, B of a micro-batch, C channels, H height, W width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfd_fast.config import require
from sfd_fast.models.texture import to_uint8

OutputType = Literal["pil", "np", "pt", "latent"]
Form = Literal["pil", "np", "pt", "latent", "uint8"]
"""of a micro-batch; uint8: (B, H, W, 3) on the host, what files hold and PIL images are made of"""
STEP_TENSORS = ("latents", "class_labels", "sample_ids")
"""what a callback_on_step_end may ask for"""


@dataclass
class PipelineOutput:
    """What a call returns: images in the order of the labels, the classes and the ids their noise came from.

    output[0] and output["images"] are the images too, as in diffusers.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    class_labels: Tensor
    sample_ids: Tensor

    def to_tuple(self) -> tuple:
        return (self.images, self.class_labels, self.sample_ids)

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


def formed(images: Tensor, form: Form) -> Tensor:
    """A micro-batch of decoded images (B, 3, H, W), about [-1, 1], as a call returns it or files hold it."""
    if form in ("pil", "uint8"):
        return to_uint8(images)
    scaled = (images.float() / 2 + 0.5).clamp(0, 1)
    return scaled if form == "pt" else scaled.permute(0, 2, 3, 1).contiguous()


def joined(parts: Sequence[Any], form: OutputType, empty: tuple[int, ...]) -> list[Image.Image] | np.ndarray | Tensor:
    """The micro-batches of a call as one. empty: the shape of no images, (0, C, H, W) for tensors."""
    if form in ("pt", "latent"):
        return torch.cat(list(parts)) if parts else torch.zeros(empty)
    if form == "pil":
        return [Image.fromarray(image) for part in parts for image in part]
    return np.concatenate(parts) if parts else np.zeros((0, empty[2], empty[3], 3), np.float32)


StepEnd = Callable[[Any, int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""callback_on_step_end(pipeline, step, tau, tensors): step counts from 0, tau is the time that `latents` has reached"""


@dataclass(frozen=True)
class Steps:
    """What follows every step of the solver: the bar moves, and the caller's function may change the latents."""

    pipeline: Any
    bar: Any = None
    function: StepEnd | None = None
    names: Sequence[str] = ("latents",)

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in STEP_TENSORS]
        require(
            not unknown,
            f"callback_on_step_end_tensor_inputs names {unknown}; this pipeline has {', '.join(STEP_TENSORS)}",
        )

    def of(self, labels: Tensor, sample_ids: Tensor) -> Callable[[int, float, Tensor], Tensor | None]:
        """For one micro-batch, which may be padded: labels, sample_ids (B,) without what pads it."""

        def after(step: int, tau: float, x: Tensor) -> Tensor | None:
            if self.bar is not None:
                self.bar.update()
            if self.function is None:
                return None
            count = len(labels)
            tensors = {"latents": x[:count].clone(), "class_labels": labels, "sample_ids": sample_ids}
            answer = self.function(self.pipeline, step - 1, tau, {name: tensors[name] for name in self.names})
            require(
                answer is None or isinstance(answer, Mapping),
                f"callback_on_step_end must return a dictionary of tensors or None, not {type(answer).__name__}",
            )
            latents = None if answer is None else answer.get("latents")
            if latents is None:
                return None
            require(
                latents.shape == x[:count].shape,
                f"callback_on_step_end returned latents of shape {tuple(latents.shape)}, not {tuple(x[:count].shape)}",
            )
            changed = x.clone()
            changed[:count] = latents
            return changed

        return after
