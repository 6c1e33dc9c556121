"""condition_silu and its backward: one program for each sample, both halves at once. B batch, D width."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.condition_silu import condition_silu, condition_silu_backward
from sfd_kernels.triton.launch import launch, packed_last, power_of_two, supported


@triton.jit
def _condition(e_sem, e_tex, e_label, columns, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """The row [e_sem | e_tex] + e_label in fp32; without e_tex, HALF is WIDTH."""
    values = tl.load(e_sem + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    if e_tex is not None:
        second = (columns >= HALF) & (columns < WIDTH)
        values += tl.load(e_tex + columns - HALF, mask=second, other=0.0).to(tl.float32)
    return values + tl.load(e_label + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    e_sem, e_tex, e_label, y, sem_sample, tex_sample, label_sample,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tex = None if e_tex is None else e_tex + sample * tex_sample
    c = _condition(e_sem + sample * sem_sample, tex, e_label + sample * label_sample, columns, WIDTH, HALF)
    tl.store(y + sample * WIDTH + columns, (c * tl.sigmoid(c)).to(y.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _backward(
    dy, e_sem, e_tex, e_label, de_sem, de_tex, de_label, dy_sample, sem_sample, tex_sample, label_sample,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    tex = None if e_tex is None else e_tex + sample * tex_sample
    c = _condition(e_sem + sample * sem_sample, tex, e_label + sample * label_sample, columns, WIDTH, HALF)
    s = tl.sigmoid(c)
    grad = tl.load(dy + sample * dy_sample + columns, mask=inside, other=0.0).to(tl.float32)
    grad *= s * (1.0 + c * (1.0 - s))
    tl.store(de_label + sample * WIDTH + columns, grad.to(de_label.dtype.element_ty), mask=inside)
    tl.store(de_sem + sample * HALF + columns, grad.to(de_sem.dtype.element_ty), mask=columns < HALF)
    if e_tex is not None:
        target = de_tex + sample * (WIDTH - HALF) + columns - HALF
        tl.store(target, grad.to(de_tex.dtype.element_ty), mask=inside & (columns >= HALF))


def _meta(e_sem: Tensor, e_label: Tensor) -> dict[str, int]:
    """One row a program, 8 values for each thread: a few hundred KB in all, so it lasts as long as its launch."""
    width = e_label.shape[-1]
    block = power_of_two(width)
    return {"WIDTH": width, "HALF": e_sem.shape[-1], "BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


@condition_silu.triton
def forward(e_sem: Tensor, e_tex: Tensor | None, e_label: Tensor) -> Tensor:
    if not supported(e_sem, e_tex, e_label):
        return NotImplemented
    dtype = torch.promote_types(e_sem.dtype, e_label.dtype)
    dtype = dtype if e_tex is None else torch.promote_types(dtype, e_tex.dtype)
    y = torch.empty(e_label.shape, dtype=dtype, device=e_label.device)
    if y.numel():
        e_sem, e_label, e_tex = packed_last(e_sem), packed_last(e_label), None if e_tex is None else packed_last(e_tex)
        launch(
            _forward, len(y), e_sem, e_tex, e_label, y,
            e_sem.stride(0), 0 if e_tex is None else e_tex.stride(0), e_label.stride(0), **_meta(e_sem, e_label),
        )  # fmt: skip
    return y


@condition_silu_backward.triton
def backward(dy: Tensor, e_sem: Tensor, e_tex: Tensor | None, e_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not supported(dy, e_sem, e_tex, e_label):
        return NotImplemented
    de_sem, de_label = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (e_sem, e_label))
    de_tex = e_sem.new_empty(0) if e_tex is None else torch.empty(e_tex.shape, dtype=e_tex.dtype, device=e_tex.device)
    if de_label.numel():
        dy, e_sem, e_label = packed_last(dy), packed_last(e_sem), packed_last(e_label)
        e_tex = None if e_tex is None else packed_last(e_tex)
        launch(
            _backward, len(de_label), dy, e_sem, e_tex, e_label, de_sem, de_tex, de_label, dy.stride(0),
            e_sem.stride(0), 0 if e_tex is None else e_tex.stride(0), e_label.stride(0), **_meta(e_sem, e_label),
        )  # fmt: skip
    return de_sem, de_tex, de_label
