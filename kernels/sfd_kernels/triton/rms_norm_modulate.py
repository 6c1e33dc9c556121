"""rms_norm_modulate and its backward on the kernels of norm.py."""

from torch import Tensor

from sfd_kernels.ops.rms_norm_modulate import rms_norm_modulate, rms_norm_modulate_backward
from sfd_kernels.triton import norm


@rms_norm_modulate.triton
def forward(x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor, eps: float) -> Tensor:
    outputs = norm.forward(x, None, None, weight, shift, scale, eps)
    return outputs if outputs is NotImplemented else outputs[1]


@rms_norm_modulate_backward.triton
def backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = norm.backward(None, dy, x, None, None, weight, scale, eps)
    return outputs if outputs is NotImplemented else (outputs[0], *outputs[3:])
