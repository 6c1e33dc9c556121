"""A whole training step as one CUDA graph: forward, backward, optimizer and averages launched by a single call."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfd_fast.config import OptimizerConfig, require

if TYPE_CHECKING:
    from sfd_fast.training.engines.interface import Batch, StepResult

WARM_UP_STEPS = 3
"""eager steps before the capture: kernels compile, the optimizer's state is made, attention is measured"""

Step = Callable[[], "StepResult"]


def capture(step: Step) -> Step:
    """Records step() on the current device; the returned function replays it and gives the same result tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # it waits for the device and empties the allocator's cache first
        result = step()

    def replay() -> "StepResult":
        graph.replay()
        return result

    return replay


def check_capturable(optimizer: OptimizerConfig, device: torch.device) -> None:
    """Raises ValueError with the reason where a whole step cannot be one graph."""
    require(
        device.type == "cuda",
        f"train.cuda_graph needs a CUDA device, and this run is on {device}: set it to false",
    )
    require(
        optimizer.name == "adamw_ema",
        f"train.cuda_graph needs optimizer.name 'adamw_ema', whose learning rate and skip stay on the device; "
        f"'{optimizer.name}' takes them from the host at every step, and a graph would keep those of its capture",
    )


class GraphedStep:
    """train_step(batches, lr) that reads only tensors of fixed addresses, captured after a few eager steps.

    step(batches, lr): one step, with lr as a 0-dim float32 tensor; it may not read anything back to the host. Noise,
    times and dropped labels follow from the sample ids in the batch, so a replay draws anew.
    Results are copies: the next replay overwrites the graph's own.
    """

    def __init__(
        self,
        step: Callable[[Sequence["Batch"], Tensor], "StepResult"],
        device: torch.device,
        capture: Callable[[Step], Step] = capture,
    ) -> None:
        self.step, self.capture = step, capture
        self.lr = torch.zeros((), device=device)
        self.batches: list[dict[str, Tensor]] = []
        self.steps_done = 0
        self.replay: Step | None = None

    def __call__(self, batches: Sequence["Batch"], lr: float) -> "StepResult":
        """Raises ValueError for batches of other shapes than the first ones."""
        self.lr.fill_(lr)
        if not self.batches:
            self.batches = [{name: value.clone() for name, value in batch.items()} for batch in batches]
        require(
            self._shapes(batches) == self._shapes(self.batches),
            f"train.cuda_graph holds for batches of one shape: {self._shapes(self.batches)} first, now "
            f"{self._shapes(batches)}",
        )
        for held, batch in zip(self.batches, batches):
            for name, value in batch.items():
                held[name].copy_(value, non_blocking=True)
        if self.steps_done < WARM_UP_STEPS:
            self.steps_done += 1
            return self._now()
        if self.replay is None:
            self.replay = self.capture(self._now)
        return self.replay().copied()

    def _now(self) -> "StepResult":
        return self.step(self.batches, self.lr)

    @staticmethod
    def _shapes(batches: Sequence["Batch"]) -> list[dict[str, tuple[int, ...]]]:
        return [{name: tuple(value.shape) for name, value in batch.items()} for batch in batches]
