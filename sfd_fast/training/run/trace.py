"""Where the time of a run goes: named ranges for NVTX and torch.profiler, and a recorded window of steps."""

import contextlib
from pathlib import Path

import torch

from sfd_fast.config import RunConfig
from sfd_fast.training.engines.interface import Engine


class Trace:
    """Records run.profile_steps steps from run.profile_start on into FOLDER/rank0.json (for Perfetto).

    A context manager; step() comes before every step. Without profile_steps and nvtx it does nothing.
    """

    def __init__(self, run: RunConfig, folder: Path, engine: Engine):
        self.folder, self.rank = folder, engine.rank
        self.nvtx = run.nvtx and engine.device.type == "cuda"
        self.start, self.stop = run.profile_start, run.profile_start + run.profile_steps
        self.count = 0
        self.profile: torch.profiler.profile | None = None
        self.activities = [torch.profiler.ProfilerActivity.CPU]
        if engine.device.type == "cuda":
            self.activities.append(torch.profiler.ProfilerActivity.CUDA)

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def step(self) -> None:
        if self.start == self.count < self.stop:
            self.profile = torch.profiler.profile(activities=self.activities, record_shapes=True, profile_memory=True)
            self.profile.start()
        elif self.count == self.stop:
            self.finish()
        self.count += 1

    def finish(self) -> None:
        if self.profile is not None:
            self.profile.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.profile.export_chrome_trace(str(self.folder / f"rank{self.rank}.json"))
            self.profile = None

    def range(self, name: str) -> contextlib.AbstractContextManager:
        """A named range around a part of the step, for whoever looks."""
        if self.nvtx:
            return torch.cuda.nvtx.range(name)
        if self.profile is not None:
            return torch.profiler.record_function(name)
        return contextlib.nullcontext()
