"""The part `training`: whole steps at XL, batch 32 (16 where that does not fit), one manner at a time in memory."""

import contextlib
import gc

import torch
from gpu_part import Part
from gpu_sampler import TINY
from training import CUDA_MANNERS, batch_of, measure_alone, settings

from sfd_fast.config.presets import XL

BATCHES = (32, 16)
MANNER_S = 25.0  # what one manner may take


def manner_rows(part: Part, manner: str) -> None:
    """Rows of one manner at the first batch size that fits."""
    name, model, sizes = ("tiny", TINY, (2,)) if part.rehearse else ("XL", XL, BATCHES)
    config, backend = settings(model), "eager" if part.rehearse else "inductor"
    for size in sizes:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            batch = batch_of(config, size, part.device)
            timing, seen = measure_alone(manner, config, batch, part.device, True, backend)
            seen |= {"images_per_s": size / timing.median * 1e3, "device_share": seen["busy_ms"] / timing.median}
            part.timed(f"{name} step, batch {size}, bf16 mix: {manner}", timing, **seen)
            return
        gc.collect()  # outside the handler: the error holds the step's tensors
        torch.cuda.empty_cache()
    part.skipped(f"{name} step: {manner}", f"out of memory at batch {sizes[-1]}")


def run_part(part: Part) -> None:
    for manner in CUDA_MANNERS:
        part.attempt(manner, lambda: manner_rows(part, manner), seconds=MANNER_S)  # noqa: B023
