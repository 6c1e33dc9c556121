"""Where the parts of a pipeline are: moved together, or each on the device only while it is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Self

import torch
from torch import nn

from sfd_fast.config import require
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.sampling.latents import LatentSampler, check_dtype, chosen_for

Use = Literal["networks", "texture_codec", "nothing"]


class PlacedSampler(LatentSampler):
    """A sampler with its codec and statistics, whose parts can be moved."""

    texture_codec: nn.Module
    statistics: LatentStatistics

    def to(self, *target: torch.device | str | int | torch.dtype | None, device=None, dtype=None) -> Self:
        """Moves all parts to a device, or the networks to another dtype, or both: to("cuda"), to(torch.bfloat16),
        to("cuda", torch.bfloat16). The codec stays in fp32. Returns the pipeline itself.

        Raises ValueError for a dtype other than float32 and bfloat16, and for another device while parts are offloaded.
        """
        for value in target:
            if isinstance(value, torch.dtype):
                require(dtype is None, "two dtypes were given: give one")
                dtype = value
            elif value is not None:
                require(device is None, "two devices were given: give one")
                device = value
        check_dtype(dtype)
        require(
            device is None or not self.offloads,
            "the parts of this pipeline move by themselves since enable_model_cpu_offload(): load it again to place it",
        )
        place = self.device if device is None else torch.device(device)
        dtype, backend = chosen_for(place, dtype or self.dtype, self._asked_backend)
        require(
            backend != "cuda_graph" or place.type == "cuda",
            f"backend 'cuda_graph' needs a CUDA device, not {place}: load the pipeline with backend='auto'",
        )
        with self._place_lock, self._lock:
            for network in self.networks:
                network.to(None if self.offloads else place, dtype)
            if not self.offloads:
                self.texture_codec.to(place)
                self.statistics = self.statistics.to(place)
            self.device, self.dtype, self.backend = place, dtype, "eager" if self.offloads else backend
            self.rounded = self.rounded or dtype == torch.bfloat16
        self._start()
        return self

    @property
    def networks(self) -> list[nn.Module]:
        return [network for network in (self.transformer, self.guide) if network is not None]

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """From now on every part waits in the CPU's memory and is on the device only while it is used.

        A call draws all of its latents with the networks there, and then decodes them with the codec there: the device
        holds the larger of the two. gpu_id: number of the CUDA device. Networks run eagerly, as captured graphs know
        their weights by address. Raises ValueError where there is no GPU, or backend "cuda_graph" was asked for.
        """
        place = torch.device(f"cuda:{gpu_id}" if gpu_id is not None else device)
        require(
            place.type != "cuda" or torch.cuda.is_available(),
            "enable_model_cpu_offload() needs a GPU, and there is none: all parts are in the CPU's memory as they are",
        )
        require(
            self._asked_backend != "cuda_graph",
            "backend 'cuda_graph' knows weights by their address, so they cannot be offloaded: load the pipeline with "
            "backend='eager' or 'compile'",
        )
        with self._place_lock, self._lock:
            self.offloads, self.device, self.backend = True, place, chosen_backend(self.backend)
            self.statistics = self.statistics.to(place)
            self.use("nothing")
        self._start()

    def use(self, part: Use) -> None:
        """Brings a part to the device and the others away from it, where parts are offloaded."""
        if not self.offloads:
            return
        away = torch.device("cpu")
        wanted = {"networks": self.networks, "texture_codec": [self.texture_codec], "nothing": []}[part]
        others = [m for m in (*self.networks, self.texture_codec) if not any(m is other for other in wanted)]
        for module, place in [*((m, away) for m in others), *((m, self.device) for m in wanted)]:
            module.to(place)

    @contextmanager
    def using(self) -> Iterator[None]:
        """Around the uses of one call: other threads' calls would move the parts away, so they wait."""
        if not self.offloads:
            yield
            return
        with self._place_lock:
            try:
                yield
            finally:
                self.use("nothing")


def chosen_backend(backend: str) -> str:
    return "eager" if backend == "cuda_graph" else backend
