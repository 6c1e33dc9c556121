"""The part `sampler`: XL with a B guide in bf16; what each backend gives, and a loop in the released manner.

Compilation comes last, as it is what may not fit into the time.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from gpu_part import Part
from released_manner import guided_euler, random_network
from timing import Timing, wall_time
from torch import Tensor, nn

from sfd_fast.config import GuidanceConfig, ModelConfig, SamplerConfig
from sfd_fast.config.presets import B_GUIDE, XL
from sfd_fast.sampling.latents import LatentSampler

BATCH, EVALUATIONS, DELTA_T, SCALE = 32, 8, 0.3, 1.5
COMPILE_S = 40.0  # what Inductor may take for both networks, cold
TINY = ModelConfig(
    hidden_size=32, depth=2, num_heads=2, grid_size=4, texture_channels=4, semantic_channels=2, num_classes=5,
    repa_channels=8, repa_hidden=16,
)  # fmt: skip


class Trajectories:
    """One micro-batch of the same noise and labels for every way of sampling it."""

    def __init__(self, part: Part) -> None:
        self.part, self.batch = part, 2 if part.rehearse else BATCH
        pair = "tiny with tiny guide" if part.rehearse else "XL with B guide"
        self.label = f"{pair}, bf16, batch {self.batch}, {EVALUATIONS} evaluations"
        torch.manual_seed(0)
        sizes = (TINY, TINY) if part.rehearse else (XL, B_GUIDE)
        self.model, self.guide = (random_network(size, part.device).bfloat16() for size in sizes)
        self.labels = torch.arange(self.batch) % sizes[0].num_classes
        self.settings = SamplerConfig(num_inference_steps=EVALUATIONS), GuidanceConfig(mode="autoguidance", scale=SCALE)

    def sampler(self, backend: str) -> LatentSampler:
        if self.part.rehearse and backend == "cuda_graph":
            backend = "eager"  # a CPU has no graphs
        return LatentSampler(
            self.model, self.guide, DELTA_T, torch_dtype=torch.bfloat16, backend=backend, device=self.part.device,
            keep_memory=False,
        )  # fmt: skip

    def latents(self, sampler: LatentSampler) -> Tensor:
        return sampler.sample_latents(self.labels, sampler.initial_noise(self.labels, 0), *self.settings)

    def released(self) -> Callable[[], Tensor]:
        labels, config = self.labels.to(self.part.device), self.model.config
        shape = (self.batch, config.channels, config.grid_size, config.grid_size)
        noise = torch.randn(shape, device=self.part.device)
        grid = torch.linspace(0, 1 + DELTA_T, EVALUATIONS + 1, device=self.part.device)
        networks: tuple[nn.Module, nn.Module] = (self.model, self.guide)
        return lambda: guided_euler(*networks, noise, labels, grid=grid, delta_t=DELTA_T, scale=SCALE)

    def speed(self, name: str, run: Callable[[], Tensor]) -> Timing:
        """A row of images/s of `run`, after a first call."""
        run()
        timing = wall_time(run, self.part.wait, num_steps=1, num_windows=1 if self.part.rehearse else 5)
        self.part.measured(
            f"{self.label}: {name}", self.batch / timing.median * 1e3, "images/s",
            low=self.batch / timing.high * 1e3, high=self.batch / timing.low * 1e3, ms=timing.median,
        )  # fmt: skip
        return timing


def quiet_trajectory(case: Trajectories, sampler: LatentSampler) -> None:
    """A checked row: once its graphs are there, a trajectory neither allocates nor waits for the device."""
    (runner,) = sampler.runners.runners.kept.values()
    noise = sampler.initial_noise(case.labels, 0)
    labels = case.labels.to(noise.device)
    if case.part.rehearse:
        runner.run(noise, labels, labels)
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner.run(noise, labels, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    new = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    case.part.checked("a captured trajectory allocates nothing and waits for nothing", new == 0, f"{new} allocations")


@contextlib.contextmanager
def compiling(part: Part) -> Iterator[None]:
    """In a rehearsal torch.compile traces and runs the trace: Inductor would take a minute."""
    if not part.rehearse:
        yield
        return
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):
        yield


@torch.no_grad()
def run_part(part: Part) -> None:
    case = Trajectories(part)
    eager, captured = case.sampler("eager"), case.sampler("cuda_graph")
    same = torch.equal(case.latents(eager), case.latents(captured))
    part.checked("captured graphs give the bits of eager steps", same)
    part.attempt("a trajectory", lambda: quiet_trajectory(case, captured))
    part.attempt("cuda_graph", lambda: case.speed("ours, cuda_graph", lambda: case.latents(captured)))
    part.attempt("eager", lambda: case.speed("ours, eager", lambda: case.latents(eager)))
    part.attempt("released", lambda: case.speed("released manner, eager", case.released()))

    def compiled() -> None:
        with compiling(part):
            sampler = case.sampler("compile")
            case.speed("ours, compile", lambda: case.latents(sampler))

    part.attempt("compile", compiled, seconds=COMPILE_S)
