"""One stage of the two-stream ODE solver, in place. B batch, C channels, K kept velocities."""

from typing import Any

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype
from sfd_kernels.registry import Op, num_bytes


def masked_velocity_update(
    x: Tensor,
    base: Tensor | None,
    history: Tensor | None,
    v: Tensor,
    v_guide: Tensor | None,
    guidance: Tensor | None,
    coefficients: Tensor,
    write_slot: Tensor | None,
    commit: Tensor | None,
    num_texture_channels: int,
) -> None:
    """Guidance, stage mask and solver update in one pass over the state; every number that changes lives on the device.

    For stream s (0 texture: the first num_texture_channels channels; 1 semantic):
      g = v_guide + guidance[s] (v - v_guide), or v without v_guide
      x = (base or x) + coefficients[s, 0] g + sum_k coefficients[s, 1 + k] history[k]
    then history[write_slot] = g if write_slot >= 0, and base = x if commit is not 0.
    A coefficient equal to 0 contributes exactly nothing, also where the velocity is NaN or infinite: that is the mask.
    A guidance weight of 1 leaves v's own bits, whatever v_guide holds.

    x, base (B, C, H, W); history (K, B, C, H, W); v, v_guide like x, of any floating dtype; guidance (2,);
    coefficients (2, 1 + K); write_slot and commit (1,) int64. Writes x, base, history. Source: docs/METHOD.md 5.
    """
    dtype = accumulation_dtype(x, v, v_guide, coefficients)
    is_texture = (torch.arange(x.shape[1], device=x.device) < num_texture_channels)[:, None, None]

    def per_channel(pair: Tensor) -> Tensor:
        return torch.where(is_texture, pair[0].to(dtype), pair[1].to(dtype))

    def term(coefficient: Tensor, velocity: Tensor) -> Tensor:
        return torch.where(coefficient == 0, 0.0, coefficient * velocity.to(dtype))

    g = v.to(dtype)
    if v_guide is not None:
        weight, guide = per_channel(guidance), v_guide.to(dtype)
        g = torch.where(weight == 1, g, guide + weight * (g - guide))
    moved = (x if base is None else base).to(dtype) + term(per_channel(coefficients[:, 0]), g)
    if history is not None:
        for k in range(history.shape[0]):
            moved = moved + term(per_channel(coefficients[:, 1 + k]), history[k])
        if write_slot is not None:
            slots = torch.arange(history.shape[0], device=x.device)[:, None, None, None, None]
            history.copy_(torch.where(slots == write_slot, g.to(history.dtype), history))
    x.copy_(moved)
    if base is not None and commit is not None:
        base.copy_(torch.where(commit != 0, x, base))


def _examples(make, size):
    k = 2
    states = make.state(k, *size.latent)
    coefficients = torch.tensor([[0.1, -0.3, 0.2], [0.2, 0.5, -0.1]], dtype=make.mode.state, device=make.device)
    guidance = torch.tensor([1.5, 1.8], dtype=make.mode.state, device=make.device)
    x, v, v_guide = make.state(*size.latent), make.narrow(*size.latent), make.narrow(*size.latent)
    last, yes, no = make.integers(1), make.integers(1), make.integers(0)
    split = size.texture_channels
    yield "guided, one step back", (x, None, states[:1], v, v_guide, guidance, coefficients[:, :2], no, None, split)
    if size.is_tiny:
        base = make.state(*size.latent)
        frozen = coefficients * torch.tensor([[0.0], [1.0]], dtype=make.mode.state, device=make.device)
        yield "all", (x, base, states, v, v_guide, guidance, coefficients, last, yes, split)
        yield "euler", (x, None, None, v, None, None, coefficients[:, :1], None, None, split)
        yield "stage", (x, base, states, v, None, None, coefficients, make.integers(-1), no, split)
        yield "masked texture", (x, base, states, v * float("nan"), None, None, frozen * 0, last, yes, split)
        one = torch.tensor([1.0, 1.8], dtype=make.mode.state, device=make.device)
        nan_texture = v_guide.clone()
        nan_texture[:, :split] = float("nan")
        yield "texture unguided", (x, base, states, v, nan_texture, one, coefficients, last, yes, split)
        yield "semantic only", (x, base, None, v, v_guide, guidance, frozen[:, :1], None, yes, split)


def _least_bytes(x: Any, base: Any, history: Any, v: Any, v_guide: Any, *scalars: Any) -> int:
    # x is written, and read where there is no base; of the history every slot is read and at most one written
    slots = 0 if history is None else num_bytes(history) + (num_bytes(history[0]) if scalars[2] is not None else 0)
    writes_base = num_bytes(base) if scalars[3] is not None else 0
    return 2 * num_bytes(x) + writes_base + slots + num_bytes((v, v_guide, *scalars))


masked_velocity_update = Op(
    masked_velocity_update,
    examples=_examples,
    flops=lambda x, base, history, *rest: x.numel() * (5 + 2 * (0 if history is None else history.shape[0])),
    least_bytes=_least_bytes,
    mutates=("x", "base", "history"),
)
