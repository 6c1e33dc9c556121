"""Implementations of an operator that are timed side by side: reference, torch.compile, ours, Liger, optimizers."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from liger import liger_call
from sfd_kernels import attention, reference_only, split_qkv
from sfd_kernels.registry import Op
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v)[0]


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    by_head = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return scaled_dot_product_attention(*by_head).transpose(1, 2)


CALLED_AS = {"qk_norm_rope": split_qkv, "attention": attention_output}
"""what the model calls where that is not the operator itself: with v, whose gradient the kernel writes too; without
the log-sum-exp"""


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in flat(item)] if isinstance(value, (tuple, list)) else []


class Provider:
    """One implementation of a case: forward() without gradients, and start() then finish(outputs) with them."""

    def __init__(self, function: Callable, op: Op, args: tuple, plain: bool) -> None:
        self.function, self.plain = function, plain
        self.args, self.trained = args, op.wanting_gradients(args)
        self.leaves = [tensor for tensor in flat(self.trained) if tensor.requires_grad]
        self.grads: list[Tensor] | None = None

    def forward(self) -> Any:
        with self.context(), torch.no_grad():
            return self.function(*self.args)

    def start(self) -> list[Tensor]:
        with self.context():
            return flat(self.function(*self.trained))

    def finish(self, outputs: list[Tensor]) -> None:
        torch.autograd.grad(outputs, self.leaves, self.output_gradients(outputs))

    def both(self) -> None:
        self.finish(self.start())

    def context(self) -> contextlib.AbstractContextManager:
        return reference_only() if self.plain else contextlib.nullcontext()

    def output_gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        if self.grads is None:
            self.grads = [torch.randn_like(output) for output in outputs]
        return self.grads


def adamw_baselines(args: tuple) -> dict[str, Callable[..., None]]:
    """AdamW and EMA as the released code runs them, and the best that torch offers, on the same tensors."""
    params, grads, firsts, seconds, emas, _, lr, decay, step, *_ = args
    beta1, beta2, eps, weight_decay = args[11:]
    keep = decay.item()
    settings = {"lr": lr.item(), "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}

    def optimizer(**kind: bool) -> torch.optim.AdamW:
        leaves = [p.detach().requires_grad_() for p in params]
        for leaf, grad in zip(leaves, grads):
            leaf.grad = grad.to(leaf.dtype)
        made = torch.optim.AdamW(leaves, **settings, **kind)
        for leaf, first, second in zip(leaves, firsts, seconds):
            made.state[leaf] = {"step": torch.tensor(step.item()), "exp_avg": first, "exp_avg_sq": second}
        return made

    foreach, fused = optimizer(foreach=True), optimizer(fused=True)

    def foreach_then_loop(*_: Any) -> None:
        foreach.step()
        for ema, p in zip(emas, params):
            ema.mul_(keep).add_(p, alpha=1 - keep)

    def fused_then_lerp(*_: Any) -> None:
        fused.step()
        torch._foreach_lerp_(emas, params, 1 - keep)

    return {"foreach_and_ema_loop": foreach_then_loop, "fused_and_foreach_lerp": fused_then_lerp}


def liger_provider(op: Op, args: tuple) -> Provider | None:
    """Liger-Kernel's own operator, where it has one and is installed."""
    try:
        found = liger_call(op.name, args)
    except ImportError:
        print("Liger-Kernel is not installed, so it is not timed: pip install liger-kernel")
        return None
    if found is None:
        return None
    function, tensors = found
    provider = Provider(function, op, tensors, False)
    provider.trained = provider.leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return provider


def make_providers(op: Op, args: tuple, device: str, backend: str = "inductor") -> dict[str, Provider]:
    """reference, compile, ours, and what else has the operator."""
    called = CALLED_AS.get(op.name, op)
    plain = op.reference if called is op else functools.partial(called)
    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)
    found = {
        "reference": Provider(plain, op, args, True),
        "compile": Provider(compiled, op, args, True),
        "ours": Provider(called, op, args, False),
    }
    if op.name == "adamw_ema_step":
        for name, function in adamw_baselines(args).items():
            found[name] = Provider(function, op, args, False)
    if op.name == "attention":
        found["sdpa"] = Provider(torch_attention, op, args, False)
    liger = liger_provider(op, args) if device == "cuda" else None
    if liger is not None:
        found["liger"] = liger
    return found
