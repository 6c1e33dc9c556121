"""The engine of one process and one device, in plain torch."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sfd_fast.config import OptimizerConfig, TrainConfig, require
from sfd_fast.training.engines.graphed import GraphedStep, check_capturable
from sfd_fast.training.engines.interface import Batch, Engine, Objective, StepResult, batch_size, stays_fp32
from sfd_fast.training.optimizer import EMA, build_optimizer, norm_of
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


def cast_by_autocast(model: nn.Module) -> list[str]:
    """Trained parameters that autocast would cast to bf16 in every step: those of Linears and convolutions."""
    return [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for own, param in module.named_parameters(recurse=False)
        if param.requires_grad
    ]


class TorchEngine(Engine):
    """Autocast or fp32, accumulation, clipping folded into the optimizer's gradient scale.

    `named` holds what the optimizer updates: the network's parameters, or the fp32 masters of those with 16 bits.
    Under bf16 autocast the weights that it would cast in every step are kept in bf16, written by the optimizer's pass:
    the same bits without the casts, forward and back.
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
            self.keep_in_bf16(name for name in self.parameters if name not in keep)
        elif train.precision == "parity" and optimizer.name == "adamw_ema":
            self.keep_in_bf16(cast_by_autocast(self.model))
        self.optimizer = build_optimizer(self.named.values(), optimizer)
        self.low_precision = {m: self.parameters[n] for n, m in self.named.items() if m is not self.parameters[n]}
        if self.low_precision:
            self.optimizer.low_precision = self.low_precision
        self.network = torch.compile(self.model) if train.compile else self.model
        if train.cuda_graph:
            check_capturable(optimizer, device)
        self.graphed = GraphedStep(self.step, device) if train.cuda_graph else None

    def keep_in_bf16(self, names: Iterable[str]) -> None:
        """Gives the network these parameters in bf16, and the optimizer their fp32 masters."""
        for name in names:
            param = self.parameters[name]
            if param.dtype == torch.float32:
                self.named[name] = nn.Parameter(param.detach().clone())
                param.data = param.data.to(torch.bfloat16)

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
            if len(batches) > 1:
                self.accumulate()
            loss = part.detach() if loss is None else loss + part.detach()
            terms.append({name: value.detach() for name, value in part_terms.items()})
        grad_norm = norm_of([grad for name in self.named if (grad := self.grad(name)) is not None])
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

    def grad(self, name: str) -> Tensor | None:
        """The gradient of a parameter: of its master where micro-batches were added up there."""
        master = self.named[name]
        return self.parameters[name].grad if master.grad is None else master.grad

    def accumulate(self) -> None:
        """Adds the gradients of 16-bit parameters to those of their masters, so that micro-batches sum in fp32."""
        for master, param in self.low_precision.items():
            if param.grad is not None:
                grad = param.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                param.grad = None

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
