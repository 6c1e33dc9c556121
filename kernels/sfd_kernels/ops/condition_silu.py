"""The activated condition vector. B batch, D width."""

from typing import Any

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype
from sfd_kernels.registry import Op, elements


def condition_silu(e_sem: Tensor, e_tex: Tensor | None, e_label: Tensor) -> Tensor:
    """SiLU(cat[e_sem, e_tex] + e_label): what every modulation Linear reads.

    e_sem and e_tex (B, D/2), e_label (B, D); with one clock e_tex is None and e_sem is (B, D). Returns (B, D) in the
    promoted dtype of the inputs. Source: c = t_emb + y_emb, [sem | tex] (docs/METHOD.md 3).
    """
    inputs = [tensor for tensor in (e_sem, e_tex, e_label) if tensor is not None]
    dtype = accumulation_dtype(*inputs)
    result = inputs[0].dtype
    for tensor in inputs[1:]:
        result = torch.promote_types(result, tensor.dtype)
    clocks = e_sem if e_tex is None else torch.cat([e_sem.to(dtype), e_tex.to(dtype)], dim=-1)
    return torch.nn.functional.silu(clocks.to(dtype) + e_label.to(dtype)).to(result)


def condition_silu_backward(
    dy: Tensor, e_sem: Tensor, e_tex: Tensor | None, e_label: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(de_sem, de_tex, de_label) of condition_silu; de_tex has shape (0,) where e_tex is None."""
    dtype = accumulation_dtype(dy, e_sem, e_tex, e_label)
    clocks = e_sem.to(dtype) if e_tex is None else torch.cat([e_sem.to(dtype), e_tex.to(dtype)], dim=-1)
    c = clocks + e_label.to(dtype)
    s = torch.sigmoid(c)
    dc = dy.to(dtype) * s * (1 + c * (1 - s))
    de_label = dc.to(e_label.dtype)
    if e_tex is None:
        return dc.to(e_sem.dtype, copy=True), e_sem.new_empty(0), de_label
    half = e_sem.shape[-1]
    return dc[:, :half].to(e_sem.dtype, copy=True), dc[:, half:].to(e_tex.dtype, copy=True), de_label


def _examples(make, size):
    b, d = size.batch, size.width
    yield "two clocks", (make.narrow(b, d // 2), make.narrow(b, d // 2), make.wide(b, d))
    if size.is_tiny:
        yield "one clock", (make.narrow(b, d), None, make.wide(b, d))


def _backward_examples(make, size):
    for label, (e_sem, e_tex, e_label) in _examples(make, size):
        yield label, (make.wide(*e_label.shape), e_sem, e_tex, e_label)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dy: Tensor) -> tuple:
    e_sem, e_tex, e_label = ctx.saved_tensors
    de_sem, de_tex, de_label = condition_silu_backward(dy, e_sem, e_tex, e_label)
    return de_sem, None if e_tex is None else de_tex, de_label


condition_silu_backward = Op(condition_silu_backward, examples=_backward_examples, flops=elements(0, 8))
condition_silu = Op(condition_silu, examples=_examples, flops=elements(2, 4), backward=condition_silu_backward)
condition_silu.register_autograd(_gradient, setup_context=_setup)
