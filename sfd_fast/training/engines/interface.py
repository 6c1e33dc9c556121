"""The engine interface of the training loop, and its plain torch implementation for one process.

An engine owns the network, the optimizer and the devices; the loop owns data, schedule, logs and checkpoints' timing.
Letters: B batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sfd_fast.config import OptimizerConfig, TrainConfig, require
from sfd_fast.files.tensors import write_safetensors
from sfd_fast.training.checkpoints import Checkpoints
from sfd_fast.training.optimizer import AdamWEMA, build_optimizer, ema_names
from sfd_fast.training.state import StateReader, restore

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


class Engine(Protocol):
    """What the loop needs. Every method is called by all ranks alike."""

    model: nn.Module
    device: torch.device
    rank: int
    world_size: int

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of one global batch."""

    def evaluate(self, batch: Batch, objective: Objective) -> dict[str, Tensor]:
        """Terms per sample without gradients, in the training precision."""

    def ema_weights(self, index: int = 0) -> AbstractContextManager[nn.Module]:
        """While inside, the network's weights are the average number `index`."""

    def eval_mode(self) -> AbstractContextManager[None]:
        """While inside, the network is in evaluation mode."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum of a small tensor over all ranks."""

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise mean of a small tensor over all ranks."""

    def max_over_ranks(self, value: float) -> float:
        """The largest of the ranks' values; waits for all ranks."""

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank (each rank gets the same answer); may answer one call late."""

    def agreed(self, flag: bool) -> bool:
        """Whether the flag is set on any rank now; waits for all ranks."""

    def barrier(self) -> None:
        """Waits for all ranks."""

    def beat(self) -> None:
        """Says that this rank makes progress, between the calls that say so themselves (train_step, evaluate)."""

    def files(self) -> dict[str, str]:
        """Files of the run directory that the engine answers for: name -> text."""

    def close(self) -> None:
        """Ends what runs beside the steps; the engine is not used afterwards."""

    def explained(self, error: RuntimeError) -> Exception:
        """The error to raise for one that the framework raised: clearer where the engine knows its cause."""

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass."""

    def notes(self, state: dict) -> list[str]:
        """What is worth saying when a checkpoint with this state is resumed here."""

    def save(self, checkpoints: Checkpoints, step: int, state: dict) -> None:
        """Writes model, averages and optimizer state as the checkpoint of `step`."""

    def load(self, folder: Path) -> None:
        """Restores what save wrote; bit-exact."""

    def export(self, index: int = 0) -> dict[str, Tensor] | None:
        """Full state dict with the averaged weights on the CPU; None on ranks other than 0."""


def check_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of a precision mode for the torch engine, or None for fp32."""
    if precision == "fp32":
        return None
    if precision in ("parity", "bf16"):
        return torch.bfloat16
    raise ValueError(
        f"train.precision '{precision}' needs loss scaling, which train.engine 'torch' does not have (it offers "
        "parity, bf16, fp32); use engine 'deepspeed'"
    )


def stays_fp32(model: nn.Module) -> list[str]:
    """Parameters that keep fp32 when weights have 16 bits: norm weights (1-D, no bias) and whatever is frozen."""
    named = model.named_parameters()
    return [n for n, p in named if not p.requires_grad or (p.dim() == 1 and n.endswith("weight"))]


class TorchEngine:
    """One process, one device: autocast or fp32, accumulation, clipping folded into the optimizer's gradient scale.

    `named` holds what the optimizer updates: the network's parameters, or with 16-bit weights their fp32 masters.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        optimizer: OptimizerConfig,
        train: TrainConfig,
        device: torch.device,
    ):
        self.device = device
        self.model = model.to(device)
        self.objective = objective
        self.max_grad_norm = optimizer.max_grad_norm
        self.autocast_dtype = check_precision(train.precision, device)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.named = dict(self.parameters)
        if train.precision == "bf16":
            require(
                optimizer.name == "adamw_ema",
                "train.precision 'bf16' rounds masters into weights inside the optimizer adamw_ema; optimizer.name is "
                f"'{optimizer.name}'",
            )
            keep = set(stays_fp32(self.model))
            for name, param in self.parameters.items():
                if name not in keep:
                    self.named[name] = nn.Parameter(param.detach().clone())
                    param.data = param.data.to(torch.bfloat16)
        self.optimizer = build_optimizer(self.named.values(), optimizer)
        masters = {m: self.parameters[n] for n, m in self.named.items() if m is not self.parameters[n]}
        if masters:
            self.optimizer.low_precision = masters
        self.network = torch.compile(self.model) if train.compile else self.model

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        total = sum(batch_size(b) for b in batches)
        loss, terms = None, []
        for batch in batches:
            with self.autocast():
                part, part_terms = self.objective(self.network, batch)
            part = part * (batch_size(batch) / total)
            part.backward()
            loss = part.detach() if loss is None else loss + part.detach()
            terms.append({name: value.detach() for name, value in part_terms.items()})
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(grads).float()
        bad = ~(torch.isfinite(grad_norm) & torch.isfinite(loss))
        if self.max_grad_norm > 0:
            scale = (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            self.optimizer.grad_scale.copy_(torch.where(bad, 1.0, scale))
        self.optimizer.skip.copy_(bad)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss, terms=terms, grad_norm=grad_norm, skipped=bad.float())

    @torch.no_grad()
    def evaluate(self, batch: Batch, objective: Objective) -> dict[str, Tensor]:
        # the plain network: validation batches of other sizes must not compile again
        with self.autocast():
            return objective(self.model, batch)[1]

    @contextmanager
    def ema_weights(self, index: int = 0) -> Iterator[nn.Module]:
        key = ema_names(self.optimizer)[index]
        swapped = []
        for name, master in self.named.items():
            if key in self.optimizer.state.get(master, {}):
                param = self.parameters[name]
                swapped.append((param, param.data))
                param.data = self.optimizer.state[master][key].to(param.dtype)
        try:
            yield self.model
        finally:
            for param, data in swapped:
                param.data = data

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def max_over_ranks(self, value: float) -> float:
        return value

    def any_rank(self, flag: bool) -> bool:
        return flag

    def agreed(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        return None

    def beat(self) -> None:
        return None

    def files(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        return None

    def explained(self, error: RuntimeError) -> Exception:
        return error

    def notes(self, state: dict) -> list[str]:
        if state["world_size"] != 1:
            return [f"saved by {state['world_size']} ranks, resumed by one: equal to rounding, not to the bit"]
        return []

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": torch.as_tensor(value)
            for name, param in self.named.items()
            for key, value in self.optimizer.state.get(param, {}).items()
        }

    def save(self, checkpoints: Checkpoints, step: int, state: dict) -> None:
        # a copy, so that training goes on while a thread writes; contiguous clones also undo shared step tensors
        model = {name: snapshot(value) for name, value in self.state_dict().items()}
        optimizer = {name: snapshot(value) for name, value in self.optimizer_tensors().items()}

        def write(folder: Path) -> None:
            write_safetensors(folder / "model.safetensors", model)
            write_safetensors(folder / "optimizer.safetensors", optimizer)

        checkpoints.save(step, write, state, background=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The network's state dict, with fp32 masters for 16-bit weights."""
        return self.model.state_dict() | {name: master.detach() for name, master in self.named.items()}

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        if (folder / "model.safetensors").is_file():
            weights = load_file(folder / "model.safetensors")
            self.model.load_state_dict(weights)
            for key, value in load_file(folder / "optimizer.safetensors").items():
                name, _, field = key.rpartition(".")
                self.optimizer.state[self.named[name]][field] = value.to(self.device)
            for name, master in self.named.items():
                master.copy_(weights[name])
        else:
            self.load_shards(folder)
        for name, master in self.named.items():
            self.parameters[name].copy_(master)
        self.optimizer.share_steps()

    def load_shards(self, folder: Path) -> None:
        """A checkpoint of the DeepSpeed engine, whatever the number of ranks."""
        if not isinstance(self.optimizer, AdamWEMA):
            raise ValueError(f"{folder} was saved by DeepSpeed ranks; resume it with optimizer.name adamw_ema")
        with StateReader(folder) as reader:
            for name, param in self.named.items():
                reader.check_size(name, param.shape)
                restore(reader, self.optimizer, name, param, 0, 0, param.numel())

    def export(self, index: int = 0) -> dict[str, Tensor]:
        key = ema_names(self.optimizer)[index]
        averages = {n: self.optimizer.state.get(m, {}).get(key, m) for n, m in self.named.items()}
        return {name: snapshot(averages.get(name, value)) for name, value in self.model.state_dict().items()}


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


def snapshot(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that later steps do not touch."""
    return tensor.detach().to("cpu", copy=True).contiguous()
