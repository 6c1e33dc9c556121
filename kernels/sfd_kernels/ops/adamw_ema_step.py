"""AdamW, the moving average of the weights and their low-precision copy in one pass. Lists of parameters."""

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype
from sfd_kernels.registry import Op, num_bytes


def adamw_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    lr: Tensor,
    ema_decay: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One update of torch.optim.AdamW, then ema = ema_decay ema + (1 - ema_decay) p, then copy = p.

      g = grad_scale grad;  p = p (1 - lr weight_decay)
      m = beta1 m + (1 - beta1) g;  s = beta2 s + (1 - beta2) g^2
      p = p - lr / (1 - beta1^step) m / (sqrt(s) / sqrt(1 - beta2^step) + eps)

    Lists of equal length (emas and copies may be empty), tensor by tensor of equal shape. lr, ema_decay, step (the
    number of this update, from 1), grad_scale and skip are 0-dim tensors on the device; skip != 0 changes nothing.
    Writes params, exp_avgs, exp_avg_sqs, emas, copies. Source: arXiv 1711.05101; torch.optim.AdamW.
    """
    keep = skip != 0
    for index, (p, grad, m, s) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        dtype = accumulation_dtype(p, m, s)
        lr_, step_ = lr.to(dtype), step.to(dtype)
        g = grad.to(dtype) * grad_scale.to(dtype)
        m_new = beta1 * m.to(dtype) + (1 - beta1) * g
        s_new = beta2 * s.to(dtype) + (1 - beta2) * g.square()
        denominator = s_new.sqrt() / torch.sqrt(1 - beta2**step_) + eps
        p_new = p.to(dtype) * (1 - lr_ * weight_decay) - lr_ / (1 - beta1**step_) * m_new / denominator
        updates = [(p, p_new), (m, m_new), (s, s_new)]
        if emas:
            ema, decay = emas[index], ema_decay.to(dtype)
            updates.append((ema, decay * ema.to(dtype) + (1 - decay) * p_new))
        if copies:
            updates.append((copies[index], p_new))
        for old, new in updates:
            old.copy_(torch.where(keep, old, new.to(old.dtype)))


def _examples(make, size):
    """The parameters of one block (qkv, projection, MLP, modulation, norms); tiny: odd sizes and every option."""
    d, h = size.width, size.hidden
    block = [(3 * d, d), (3 * d,), (d, d), (d,), (2 * h, d), (2 * h,), (d, h), (d,), (6 * d, d), (6 * d,), (d,), (d,)]
    shapes = [(5, 7), (1,), (129,)] if size.is_tiny else block

    def lists(ema: bool, copy: bool) -> tuple:
        params = [make.state(*shape) for shape in shapes]
        grads = [make.narrow(*shape) for shape in shapes]
        firsts = [0.1 * make.state(*shape) for shape in shapes]
        seconds = [0.01 * make.state(*shape).square() for shape in shapes]
        emas = [make.state(*shape) for shape in shapes] if ema else []
        copies = [p.to(make.mode.narrow, copy=True) for p in params] if copy else []
        return params, grads, firsts, seconds, emas, copies

    def scalars(step: int, skip: int) -> tuple:
        return tuple(make.scalar(value) for value in (1e-3, 0.99, step, 0.5, skip))

    yield "ema", (*lists(True, False), *scalars(3, 0), 0.9, 0.999, 1e-8, 0.01)
    if size.is_tiny:
        yield "ema and copy", (*lists(True, True), *scalars(1, 0), 0.9, 0.95, 1e-8, 0.0)
        yield "plain", (*lists(False, False), *scalars(1000, 0), 0.9, 0.999, 1e-8, 0.1)
        params, grads, firsts, seconds, *rest = lists(True, True)
        low = [[moment.to(torch.bfloat16) for moment in moments] for moments in (firsts, seconds)]
        yield "bf16 moments", (params, grads, *low, *rest, *scalars(3, 0), 0.9, 0.999, 1e-8, 0.01)
        yield "skipped", (*lists(True, True), *scalars(3, 1), 0.9, 0.999, 1e-8, 0.01)


def _least_bytes(params, grads, exp_avgs, exp_avg_sqs, emas, copies, *rest) -> int:
    return 2 * num_bytes((params, exp_avgs, exp_avg_sqs, emas)) + num_bytes((grads, copies, rest))


adamw_ema_step = Op(
    adamw_ema_step,
    examples=_examples,
    flops=lambda params, *rest: 18 * sum(p.numel() for p in params),
    least_bytes=_least_bytes,
    mutates=("params", "exp_avgs", "exp_avg_sqs", "emas", "copies"),
)
