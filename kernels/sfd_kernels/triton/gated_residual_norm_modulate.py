"""gated_residual_norm_modulate and its backward are the kernels of norm.py."""

from sfd_kernels.ops.gated_residual_norm_modulate import (
    gated_residual_norm_modulate,
    gated_residual_norm_modulate_backward,
)
from sfd_kernels.triton import norm

gated_residual_norm_modulate.triton(norm.forward)
gated_residual_norm_modulate_backward.triton(norm.backward)
