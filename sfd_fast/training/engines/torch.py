"""The engine of one process and one device, in plain torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sfd_fast.config import OptimizerConfig, TrainConfig, require
from sfd_fast.training.engines.graphed import GraphedStep, check_capturable
from sfd_fast.training.engines.interface import Batch, Engine, Objective, StepResult, batch_size, stays_fp32
from sfd_fast.training.optimizer import EMA, build_optimizer
from sfd_fast.training.state import Piece, StateReader, restore, whole_piece


def check_precision(precision: str) -> torch.dtype | None:
    """The autocast dtype of a precision mode for the torch engine, or None for fp32."""
    if precision == "fp32":
        return None
    if precision in ("parity", "bf16"):
        return torch.bfloat16
    raise ValueError(
        f"train.precision '{precision}' needs loss scaling, which train.engine 'torch' does not have (it offers "
        "parity, bf16, fp32); use engine 'deepspeed'"
    )


class TorchEngine(Engine):
    """Autocast or fp32, accumulation, clipping folded into the optimizer's gradient scale.

    `named` holds what the optimizer updates: the network's parameters, or with 16-bit weights their fp32 masters.
    """

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
        self.autocast_dtype = check_precision(train.precision)
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
        if train.cuda_graph:
            check_capturable(optimizer, device)
        self.graphed = GraphedStep(self.step, device) if train.cuda_graph else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        return self.step(batches, lr) if self.graphed is None else self.graphed(batches, lr)

    def step(self, batches: Sequence[Batch], lr: float | Tensor) -> StepResult:
        """One step, launched kernel by kernel; with lr on the device it can be captured."""
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
    def ema_weights(self) -> Iterator[nn.Module]:
        swapped = []
        for name, master in self.named.items():
            if EMA in self.optimizer.state.get(master, {}):
                param = self.parameters[name]
                swapped.append((param, param.data))
                param.data = self.optimizer.state[master][EMA].to(param.dtype)
        try:
            yield self.model
        finally:
            for param, data in swapped:
                param.data = data

    def pieces(self) -> Iterator[Piece]:
        for name, master in self.named.items():
            yield whole_piece(name, master, self.optimizer.state.get(master, {}))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        with StateReader(folder) as reader:
            for name, master in self.named.items():
                reader.check_size(name, master.shape)
                restore(reader, self.optimizer, name, master, 0, 0, master.numel())
                self.parameters[name].copy_(master)
        self.optimizer.share_steps()

    def export(self) -> dict[str, Tensor]:
        averages = {n: self.optimizer.state.get(m, {}).get(EMA, m) for n, m in self.named.items()}
        state = {name: averages.get(name, value) for name, value in self.model.state_dict().items()}
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
