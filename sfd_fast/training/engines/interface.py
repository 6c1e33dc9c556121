"""What the training loop asks of an engine, which owns the network, the optimizer and the devices.

The loop owns data, schedule, logs and the timing of checkpoints.
Letters: B batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from sfd_fast.training.checkpoints import Checkpoints
from sfd_fast.training.state import Piece, snapshot_pieces, state_file, write_pieces

T = TypeVar("T")
Batch = Mapping[str, Tensor]
Objective = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
"""(network, batch) -> (scalar to differentiate, terms per sample {name: (B,)})"""

OVERFLOW = 2.0


@dataclass
class StepResult:
    """What one optimizer step reports, all on the device: nothing here has been read by the host."""

    loss: Tensor
    """0-dim: mean over this rank's samples"""
    terms: list[dict[str, Tensor]]
    """per micro-batch and sample"""
    grad_norm: Tensor
    """0-dim: norm of the gradient of the global batch, before clipping"""
    skipped: Tensor
    """0-dim float: 0 where the update was made; 1 where it was skipped because loss or gradient was not finite;
    OVERFLOW where only the fp16 loss scale was too high, which is how DeepSpeed looks for the right one"""

    def copied(self) -> "StepResult":
        """The same in tensors of its own."""
        terms = [{name: value.clone() for name, value in found.items()} for found in self.terms]
        return StepResult(self.loss.clone(), terms, self.grad_norm.clone(), self.skipped.clone())


class Engine(ABC):
    """Every method is called by all ranks alike; what is not abstract serves an engine of one process."""

    model: nn.Module
    device: torch.device
    rank = 0
    world_size = 1

    @abstractmethod
    def autocast(self) -> torch.autocast:
        """The precision of a forward pass."""

    @abstractmethod
    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of one global batch."""

    @abstractmethod
    def evaluate(self, batch: Batch, objective: Objective) -> dict[str, Tensor]:
        """Terms per sample without gradients, in the training precision."""

    @abstractmethod
    def ema_weights(self) -> AbstractContextManager[nn.Module]:
        """While inside, the network's weights are their average."""

    @abstractmethod
    def pieces(self) -> Iterable[Piece]:
        """This rank's part of the training state, as views."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restores what save wrote, whichever engine did; to the bit."""

    @abstractmethod
    def export(self) -> dict[str, Tensor] | None:
        """Full state dict with the averaged weights on the CPU; None on ranks other than 0."""

    def own_state(self) -> dict:
        """What the engine adds to a checkpoint's state.json."""
        return {}

    def save(self, checkpoints: Checkpoints, step: int, state: dict) -> None:
        """Writes weights, moments and averages as the checkpoint of `step`, in a thread: training goes on meanwhile."""
        together(self, "write its part of the last checkpoint", checkpoints.wait)
        pieces = snapshot_pieces(self.pieces())

        def write(folder: Path) -> None:
            write_pieces(folder / state_file(self.rank), pieces)

        checkpoints.save(step, write, state | self.own_state(), background=True)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """While inside, the network is in evaluation mode."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum of a small tensor over all ranks."""
        return values

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise mean of a small tensor over all ranks."""
        return self.sum_over_ranks(values) / self.world_size

    def max_over_ranks(self, value: float) -> float:
        """The largest of the ranks' values; waits for all ranks."""
        return value

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in their order: anything that pickle takes, small."""
        return [value]

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank (each rank gets the same answer); may answer one call late."""
        return flag

    def agreed(self, flag: bool) -> bool:
        """Whether the flag is set on any rank now; waits for all ranks."""
        self.beat()
        return self.max_over_ranks(flag) > 0

    def beat(self) -> None:
        """Says that this rank makes progress, between the calls that say so themselves (train_step, evaluate)."""
        return

    def files(self) -> dict[str, str]:
        """Files of the run directory that the engine answers for: name -> text."""
        return {}

    def close(self) -> None:
        """Ends what runs beside the steps; the engine is not used afterwards."""
        return

    def explained(self, error: RuntimeError) -> Exception:
        """The error to raise for one that the framework raised: clearer where the engine knows its cause."""
        return error


def stays_fp32(model: nn.Module) -> list[str]:
    """Parameters that keep fp32 when weights have 16 bits: norm weights (1-D, no bias) and whatever is frozen."""
    named = model.named_parameters()
    return [n for n, p in named if not p.requires_grad or (p.dim() == 1 and n.endswith("weight"))]


def together(engine: Engine, what: str, action: Callable[[], T]) -> T:
    """action() on every rank; where it fails on one, all raise at once, and none waits for a rank that has gone.

    `what` the rank was to do, for the message on the others. The action may not contain collectives.
    """
    failure = result = None
    try:
        result = action()
    except Exception as error:
        failure = error
    if engine.agreed(failure is not None):
        raise failure or OSError(f"another rank could not {what}; its message says why")
    return result


def batch_size(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]
