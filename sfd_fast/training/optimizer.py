"""AdamW with exponential moving averages of the weights in its own state, and the choice among optimizers.

The averages stand beside the Adam moments, so whatever shards, offloads, saves or restores optimizer state does the
same to them. One kernel pass updates moments, weights and average (sfd_kernels.adamw_ema_step).
"""

import importlib
import math
from collections.abc import Callable, Iterable

import torch
from sfd_kernels import adamw_ema_step, total_norm
from torch import Tensor

from sfd_fast.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"
"""the average that models are exported with; the extra ones are ema_1, ema_2, ..."""


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (decoupled weight decay, bias correction) and ema = d * ema + (1 - d) * param, in one pass.

    State per parameter: step (0-dim float32, number of updates made), exp_avg, exp_avg_sq, ema and, for
    extra_ema_decays, ema_1, ema_2, ... An average starts as a copy of the weights before the first update.

    Two device scalars steer a step without a host read; whoever calls step() writes them:
      grad_scale   every gradient is multiplied by it (clipping, loss scale);  1 at first
      skip         != 0 leaves weights, moments, averages and the step number untouched
    `before_step`, where set, is called at the start of step() and may write both (DeepSpeed calls step() itself).
    `low_precision` maps fp32 masters to the 16-bit parameters that a network computes with: their gradients are used,
    and the same pass rounds the new masters into them.
    Source: AdamW (arXiv 1711.05101); with ema_warmup the decay of update n = 0, 1, ... is min(d, (1 + n) / (10 + n)).
    """

    def __init__(
        self,
        params: Iterable,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float = 0.9999,
        extra_ema_decays: tuple[float, ...] = (),
        ema_warmup: bool = False,
        moment_dtype: torch.dtype | None = None,
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.ema_decays = (ema_decay, *extra_ema_decays)
        self.ema_warmup = ema_warmup
        self.moment_dtype = moment_dtype
        self.before_step: Callable[[], None] | None = None
        self.low_precision: dict[Tensor, Tensor] = {}
        device = self.param_groups[0]["params"][0].device
        self.grad_scale = torch.ones((), device=device)
        self.skip = torch.zeros((), device=device)

    def grad(self, param: Tensor) -> Tensor | None:
        """The gradient that updates a parameter: its own, or where it has none that of its low-precision copy."""
        return self.low_precision.get(param, param).grad if param.grad is None else param.grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for copy in self.low_precision.values():
            copy.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient, unless `skip` is set."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.before_step is not None:
            self.before_step()
        for group in self.param_groups:
            # parameters share their step number, except after gradients were absent for some of them
            by_step: dict[tuple[int, bool], list[Tensor]] = {}
            fresh = None
            for param in group["params"]:
                if self.grad(param) is None:
                    continue
                if param not in self.state or not self.state[param]:
                    fresh = torch.zeros((), device=param.device) if fresh is None else fresh
                    init_state(self, param, fresh)
                kind = id(self.state[param]["step"]), param in self.low_precision
                by_step.setdefault(kind, []).append(param)
            numbers = {}
            for (step, _), params in by_step.items():
                numbers[step] = self.update(params, group)
            for done in numbers.values():
                done.add_((self.skip.to(done.device) == 0).to(done.dtype))
        return loss

    def update(self, params: list[Tensor], group: dict) -> Tensor:
        """One kernel call; returns the step number that these parameters share, for step() to raise."""
        states = [self.state[p] for p in params]
        done = states[0]["step"]
        device = params[0].device
        skip, grad_scale = (x if x.device == device else x.to(device) for x in (self.skip, self.grad_scale))
        number = done + 1
        decays = [self.decay(d, number) for d in self.ema_decays]
        lr = group["lr"]
        adamw_ema_step(
            params,
            [self.grad(p) for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["ema"] for s in states],
            [self.low_precision[p] for p in params if p in self.low_precision],
            lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float32, device=device),
            decays[0],
            number,
            grad_scale,
            skip,
            *group["betas"],
            group["eps"],
            group["weight_decay"],
        )
        for i, decay in enumerate(decays[1:], start=1):
            lerp_ema([s[f"ema_{i}"] for s in states], params, decay, skip)
        return done

    def decay(self, decay: float, number: Tensor) -> Tensor:
        full = torch.full((), decay, dtype=torch.float32, device=number.device)
        return torch.minimum(full, number / (9 + number)) if self.ema_warmup else full

    def share_steps(self) -> None:
        """Gives parameters with equal step numbers one tensor, so that a step is one kernel call."""
        for group in self.param_groups:
            shared: dict[float, Tensor] = {}
            for param in group["params"]:
                state = self.state.get(param)
                if state:
                    step = torch.as_tensor(state["step"], dtype=torch.float32).to(param.device)
                    state["step"] = shared.setdefault(float(step), step)


class WithEMA:
    """An optimizer of another library, followed by a pass that updates the averages in its state.

    Same attributes as AdamWEMA: grad_scale, skip, before_step. torch's fused AdamW takes both scalars on the device;
    the others cannot, so their gradients are multiplied first and `skip` is read on the host at each step.
    """

    moment_dtype = None

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, *, device_scalars: bool):
        self.optimizer = optimizer
        self.ema_decays = (config.ema_decay, *config.extra_ema_decays)
        self.ema_warmup = config.ema_warmup
        self.device_scalars = device_scalars
        self.before_step: Callable[[], None] | None = None
        device = self.param_groups[0]["params"][0].device
        self.grad_scale = torch.ones((), device=device)
        self.skip = torch.zeros((), device=device)
        self.num_updates = torch.zeros((), device=device)

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @property
    def state(self) -> dict:
        return self.optimizer.state

    @torch.no_grad()
    def step(self) -> None:
        if self.before_step is not None:
            self.before_step()
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        before = {p: p.detach().clone() for p in params if "ema" not in self.state[p]}
        if self.device_scalars:
            # torch divides by grad_scale
            self.optimizer.grad_scale = 1.0 / self.grad_scale
            self.optimizer.found_inf = (self.skip != 0).float()
            self.optimizer.step()
        elif not bool(self.skip):
            torch._foreach_mul_([p.grad for p in params], self.grad_scale)
            self.optimizer.step()
        for param, start in before.items():
            for name in ema_names(self):
                self.state[param][name] = start.clone()
        self.num_updates.add_((self.skip == 0).float())
        for decay, name in zip(self.ema_decays, ema_names(self)):
            decay = torch.full((), decay, device=self.skip.device)
            if self.ema_warmup:
                decay = torch.minimum(decay, self.num_updates / (9 + self.num_updates))
            lerp_ema([self.state[p][name] for p in params], params, decay, self.skip)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def share_steps(self) -> None:
        """Takes the number of updates from restored state."""
        steps = [torch.as_tensor(s["step"]).float() for s in self.state.values() if "step" in s]
        if steps:
            self.num_updates.copy_(torch.stack([s.to(self.num_updates.device) for s in steps]).max())


def init_state(optimizer: "AdamWEMA | WithEMA", param: Tensor, step: Tensor) -> None:
    """The state of a parameter before its first update: `step`, moments of zero, averages equal to the weight."""
    state = optimizer.state[param]
    state["step"] = step
    for name in MOMENTS:
        state[name] = torch.zeros_like(param, dtype=optimizer.moment_dtype, memory_format=torch.preserve_format)
    for name in ema_names(optimizer):
        state[name] = param.detach().clone()


def ema_names(optimizer: "AdamWEMA | WithEMA") -> list[str]:
    """Names of the averages in the state: ema, ema_1, ema_2, ..."""
    return [EMA] + [f"ema_{i}" for i in range(1, len(optimizer.ema_decays))]


def lerp_ema(emas: list[Tensor], params: list[Tensor], decay: Tensor, skip: Tensor) -> None:
    """ema = decay * ema + (1 - decay) * param, or nothing at all where skip != 0; device scalars."""
    if not emas:
        return
    weight = torch.where(skip != 0, torch.zeros_like(decay), 1 - decay)
    params = [p if p.dtype == e.dtype else p.to(e.dtype) for p, e in zip(params, emas)]
    # a + w (b - a) is exactly a for w = 0 and finite b; a skipped step leaves the parameters finite
    torch._foreach_lerp_(emas, params, [weight.to(e.dtype) for e in emas])


@torch.no_grad()
def norm_of(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together: 0-dim fp32, added up in fp32 whatever their dtype."""
    if grads[0].device.type == "cpu":
        return total_norm(grads).float()
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))


def build_optimizer(params: Iterable, config: OptimizerConfig) -> AdamWEMA | WithEMA:
    """The optimizer that config.name asks for, over parameters or parameter groups.

    Raises ValueError with the install command where its library is absent or cannot run here.
    """
    params = list(params)
    betas = (config.beta1, config.beta2)
    settings = {"lr": config.lr, "betas": betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "adamw_ema":
        return AdamWEMA(
            params,
            **settings,
            ema_decay=config.ema_decay,
            extra_ema_decays=tuple(config.extra_ema_decays),
            ema_warmup=config.ema_warmup,
            moment_dtype=torch.bfloat16 if config.moments == "bf16" else None,
        )
    if config.name == "torch_fused":
        return WithEMA(torch.optim.AdamW(params, fused=True, **settings), config, device_scalars=True)
    kind = fused_adam(config.name)
    return WithEMA(kind(params, adam_w_mode=True, **settings), config, device_scalars=False)


def fused_adam(name: str) -> type[torch.optim.Optimizer]:
    """DeepSpeed's or apex's FusedAdam class; both are CUDA only."""
    module, install = {
        "deepspeed": ("deepspeed.ops.adam", "DS_BUILD_OPS=0 pip install deepspeed==0.19.8"),
        "apex": ("apex.optimizers", "build github.com/NVIDIA/apex from source (PyPI's apex is something else)"),
    }[name]
    if not torch.cuda.is_available():
        raise ValueError(
            f"optimizer.name '{name}' is FusedAdam of {module}, which runs on CUDA only, and there is no CUDA device "
            "here; choose adamw_ema or torch_fused"
        )
    try:
        return importlib.import_module(module).FusedAdam
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"optimizer.name '{name}' needs {module}.FusedAdam, which cannot be imported ({error}); "
            f"install: {install}; or choose adamw_ema or torch_fused"
        ) from error


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Learning rate of update number `step`, counted from 0.

    lr * min(1, (step + 1) / warmup_steps), or with warmup_start w > 0 lr * min(1, w + (1 - w) step / warmup_steps), and
    with the cosine schedule times
    r + (1 - r) (1 + cos(pi p)) / 2,  p = (step - decay_start) / (max_steps - decay_start) clamped to [0, 1],
    r = final_lr_ratio.
    """
    rate = config.lr
    if config.warmup_steps:
        start = config.warmup_start
        done = start + (1 - start) * step / config.warmup_steps if start else (step + 1) / config.warmup_steps
        rate *= min(1.0, done)
    if config.schedule == "cosine":
        progress = (step - config.decay_start) / max(1, max_steps - config.decay_start)
        progress = min(1.0, max(0.0, progress))
        rate *= config.final_lr_ratio + (1 - config.final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
    return rate
