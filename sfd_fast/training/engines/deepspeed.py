"""The DeepSpeed engine of the training loop: ZeRO 0 to 3 on one or many ranks; the only file that imports DeepSpeed.

DeepSpeed shards, communicates and calls the optimizer; the step is ours: AdamWEMA updates moments, weights and
averages in one pass over each shard, with clipping and skipping decided on the device just before. With 16-bit weights,
norm weights and the position embedding stay fp32: they are taken out of the network's parameters and updated beside
ZeRO, the same on every rank.
"""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfd_fast.ranks import Ranks
from sfd_fast.training.checkpoints import read_state
from sfd_fast.training.engines.deepspeed_json import batch_shares, generate
from sfd_fast.training.engines.interface import OVERFLOW, Batch, Engine, Objective, StepResult, stays_fp32, together
from sfd_fast.training.engines.watchdog import Watchdog
from sfd_fast.training.engines.zero import Masters
from sfd_fast.training.job import Job
from sfd_fast.training.optimizer import EMA, AdamWEMA, build_optimizer, norm_of
from sfd_fast.training.state import WEIGHT, Piece, StateReader, restore, whole_piece

INSTALL = "DS_BUILD_OPS=0 pip install deepspeed==0.19.8"
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def load_deepspeed(device: str):
    """The deepspeed module, its accelerator set to the device's type. ValueError with the install command if absent."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"train.engine 'deepspeed' needs the package deepspeed, which cannot be imported ({error}); install: "
            f"{INSTALL}; or set train.engine to torch"
        ) from error
    # built by g++ at first use, which takes minutes, and its shared memory outlives a killed rank; gloo serves as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class LostRankError(OSError):
    """Another rank died or hangs."""


def take_out(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Replaces parameters by plain tensors of the same attribute names: neither cast nor sharded by DeepSpeed."""
    taken = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        value = module._parameters.pop(attribute)
        tensor = value.detach().clone().requires_grad_(value.requires_grad)
        setattr(module, attribute, tensor)
        taken[name] = tensor
    return taken


class DeepSpeedEngine(Engine):
    """One or many ranks under a ZeRO stage."""

    def __init__(self, job: Job, device: torch.device | str | None = None):
        self.job = job
        train, settings = job.train, job.deepspeed
        ranks = Ranks.announce()
        self.device = ranks.device("auto" if device is None else str(device))
        kind = self.device.type
        if kind == "cuda":
            os.environ["LOCAL_RANK"] = str(self.device.index)  # DeepSpeed takes the device's number from there
        deepspeed = load_deepspeed(kind)
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.timeout = timedelta(seconds=settings.timeout_s)
        _, self.accumulation = batch_shares(train, self.world_size)
        self.config = generate(train, job.optimizer, settings, world_size=self.world_size, device=kind)
        if not dist.is_initialized():
            # what a run does is said by the loop
            deepspeed.utils.logger.setLevel(logging.WARNING if self.rank == 0 else logging.ERROR)
            backend = "nccl" if kind == "cuda" else "gloo"
            deepspeed.init_distributed(dist_backend=backend, timeout=self.timeout, verbose=False)
        # flags travel on the CPU, beside the collectives of the step: no rank waits for a device
        self.control = dist.new_group(backend="gloo", timeout=self.timeout) if self.world_size > 1 else None
        self.pending = None

        self.shapes = {name: value.shape for name, value in job.model.state_dict().items()}
        self.stage = settings.zero_stage
        self.low_precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(train.precision)
        model = job.model.to(self.device)
        self.kept = take_out(model, stays_fp32(model)) if self.low_precision else {}
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer: AdamWEMA = build_optimizer(self.named.values(), job.optimizer)
        self.optimizer.before_step = self.prepare_update
        self.trained_beside = {name: value for name, value in self.kept.items() if value.requires_grad}
        trained = self.trained_beside.values()
        self.beside: AdamWEMA | None = build_optimizer(trained, job.optimizer) if trained else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=list(self.named.values()),
                optimizer=self.optimizer,
                config=self.config,
                dist_init_required=False,
            )
        if train.compile:
            self.engine.compile()
        self.zero = self.engine.optimizer if self.stage > 0 else None
        self.scaler = getattr(self.zero, "loss_scaler", None)
        if self.scaler is not None and self.scaler.dynamic:
            # train.max_bad_steps decides how many overflows at the lowest scale are too many
            self.scaler.raise_error_at_min_scale = False
        self.masters = Masters(self.zero, self.stage, self.named, self.shapes, self.optimizer, self.rank)
        self.model = model
        self.loss_bad = torch.zeros((), device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self.watchdog = Watchdog(self.rank, settings.timeout_s)

    def files(self) -> dict[str, str]:
        """The JSON that DeepSpeed got, kept in the run directory."""
        return {"deepspeed.json": json.dumps(self.config, indent=1) + "\n"}

    # ---------------------------------------------------------------- the step

    def autocast(self) -> torch.autocast:
        dtype = torch.bfloat16 if self.job.train.precision == "parity" else self.low_precision
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def network(self, *inputs: Tensor, **options: object):
        """The network as the objective calls it. With 16-bit weights autocast casts activations to meet them."""
        if self.low_precision is None:
            return self.engine(*inputs, **options)
        with self.autocast():
            return self.engine(*inputs, **options)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        self.watchdog.beat()
        scaler = self.scaler
        scale_can_fall = scaler is not None and scaler.dynamic and scaler.cur_scale > scaler.min_scale
        loss, terms = None, []
        for batch in batches:
            part, part_terms = self.job.objective(self.network, batch)
            self.engine.backward(part)
            mean = part.detach() / len(batches)
            loss = mean if loss is None else loss + mean
            terms.append({name: value.detach() for name, value in part_terms.items()})
            if len(terms) == len(batches):
                self.loss_bad = self.maximum(~torch.isfinite(loss))
                for group in self.engine.optimizer.param_groups:
                    group["lr"] = lr
                self.reduce_beside(lr)
            self.engine.step()
        if self.zero is not None and self.zero.overflow:
            # DeepSpeed did not call the optimizer at all, nor made small parameters whole again
            if self.stage == 3:
                self.masters.gather_persistent()
            self.grad_norm = torch.full((), float("inf"), device=self.device)
            # a finite loss of which a lower scale may leave a finite gradient
            searching = (self.loss_bad == 0) & scale_can_fall
            self.optimizer.skip.copy_(torch.where(searching, OVERFLOW, 1.0))
        skipped = self.optimizer.skip.clone()
        self.step_beside(skipped)
        return StepResult(loss=loss, terms=terms, grad_norm=self.grad_norm, skipped=skipped)

    def prepare_update(self) -> None:
        """Called by the optimizer at the start of its step: clipping and skipping, decided without a host read."""
        if self.zero is None:
            grads = [p.grad for p in self.named.values() if p.grad is not None]
            norm = norm_of(grads)
        else:
            norm = torch.as_tensor(self.zero._global_grad_norm, dtype=torch.float32, device=self.device)
            norm = torch.where(norm < 0, torch.full_like(norm, float("inf")), norm)
        if self.beside is not None:
            norm = (norm.square() + self.beside_norm.square()).sqrt()
        bad = (self.loss_bad != 0) | ~torch.isfinite(norm)
        self.grad_norm = norm
        self.optimizer.skip.copy_(bad)
        limit = self.job.optimizer.max_grad_norm
        if limit > 0:
            self.optimizer.grad_scale.copy_(torch.where(bad, 1.0, (limit / (norm + 1e-6)).clamp(max=1.0)))

    def maximum(self, flag: Tensor) -> Tensor:
        flag = flag.float()
        if self.world_size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return flag

    def reduce_beside(self, lr: float) -> None:
        """Averages the gradients of the fp32 parameters beside ZeRO over ranks and removes the loss scale."""
        if self.beside is None:
            return
        grads = [p.grad for p in self.trained_beside.values()]
        flat = torch.cat([g.flatten() for g in grads])
        if self.world_size > 1:
            dist.all_reduce(flat)
        flat /= self.world_size * float(self.zero.loss_scale)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(part.view_as(grad))
        self.beside_norm = flat.norm()
        for group in self.beside.param_groups:
            group["lr"] = lr

    def step_beside(self, skipped: Tensor) -> None:
        if self.beside is not None:
            self.beside.skip.copy_(skipped)
            self.beside.grad_scale.copy_(self.optimizer.grad_scale)
            self.beside.step()
            self.beside.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, batch: Batch, objective: Objective) -> dict[str, Tensor]:
        self.watchdog.beat()
        return objective(self.network, batch)[1]

    # ------------------------------------------------------------ among ranks

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.clone()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def max_over_ranks(self, value: float) -> float:
        largest = torch.tensor(value, dtype=torch.float64)
        if self.control is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return float(largest)

    def gather(self, value: object) -> list:
        values = [value] * self.world_size
        if self.control is not None:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def any_rank(self, flag: bool) -> bool:
        """As of the previous call: the answer travels while a step is computed, so no rank waits for it."""
        if self.control is None:
            return flag
        answer = False
        if self.pending is not None:
            work, value = self.pending
            work.wait()
            answer = bool(value)
        value = torch.tensor(int(flag))
        self.pending = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control, async_op=True), value
        return answer

    def beat(self) -> None:
        self.watchdog.beat()

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # a lost rank has been reported already
            if self.pending is not None:
                self.pending[0].wait()
                self.pending = None
        self.watchdog.stop()
        self.engine.destroy()

    def explained(self, error: RuntimeError) -> Exception:
        signs = ("connection", "gloo", "nccl", "timed out", "timeout", "socket", "peer")
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        lost = isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)
        if self.world_size == 1 or not lost:
            return error
        return LostRankError(
            f"rank {self.rank} of {self.world_size} has lost another rank: it died, or did not answer within "
            f"{self.timeout.total_seconds():g} s (deepspeed.timeout_s). The first rank to report an error knows why. "
            f"All ranks end now; start again to go on from the last checkpoint. ({message})"
        )

    # ------------------------------------------------------------------ state

    def pieces(self) -> Iterator[Piece]:
        yield from self.masters.pieces()
        if self.rank == 0:
            yield from (whole_piece(name, v, self.beside.state.get(v, {})) for name, v in self.trained_beside.items())

    def own_state(self) -> dict:
        scaler = {f: getattr(self.scaler, f) for f in LOSS_SCALER_FIELDS if hasattr(self.scaler, f)}
        return {"deepspeed": {"zero_stage": self.stage, "loss_scaler": scaler}}

    def load(self, folder: Path) -> None:
        state = read_state(folder, verify=False)
        together(self, f"read {folder}", lambda: self.read(folder))
        for optimizer in filter(None, (self.optimizer, self.beside)):
            optimizer.share_steps()
        saved = state.get("deepspeed", {}).get("loss_scaler", {})
        for field in saved.keys() & set(LOSS_SCALER_FIELDS):
            setattr(self.scaler, field, saved[field])
        self.engine.global_steps = state["step"]
        self.engine.micro_steps = state["step"] * self.accumulation
        self.masters.refresh()

    def read(self, folder: Path) -> None:
        """Fills this rank's masters, moments and averages: no collectives."""
        with StateReader(folder, share=(self.rank, self.world_size)) as reader:
            self.masters.read(reader)
            for name, value in self.trained_beside.items():
                reader.check_size(name, value.shape)
                restore(reader, self.beside, name, value, 0, 0, value.numel())

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """The averages are written where DeepSpeed keeps the network's weights; masters are put back afterwards."""
        beside = [v for v in self.trained_beside.values() if EMA in self.beside.state.get(v, {})]
        backup = [v.detach().clone() for v in beside]
        with torch.no_grad():
            for value in beside:
                value.copy_(self.beside.state[value][EMA])
        masters = self.masters.show(EMA)
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for value, old in zip(beside, backup):
                    value.copy_(old)
            self.masters.put_back(masters)

    def export(self) -> dict[str, Tensor] | None:
        mine = {p.name: p for p in self.pieces()}
        state = {}
        for name, shape in self.shapes.items():
            if name not in self.named and name not in self.trained_beside:
                continue
            self.beat()
            whole = torch.zeros(shape.numel(), device=self.device)
            if name in mine:
                piece = mine[name]
                whole[piece.start : piece.stop] = piece.fields.get(EMA, piece.fields[WEIGHT])
            if self.world_size > 1:
                # every element has one owner, so the sum is a gather
                dist.reduce(whole, 0)
            if self.rank == 0:
                state[name] = whole.view(shape).cpu()
        if self.rank > 0:
            return None
        # buffers and frozen parameters are functions of the model's configuration
        fresh = type(self.model)(self.model.config).state_dict()
        return {name: state.get(name, fresh[name]) for name in self.shapes}
