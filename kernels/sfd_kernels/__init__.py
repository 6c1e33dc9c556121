"""Fused operators for diffusion transformers: Triton on CUDA, C++ on the CPU, plain PyTorch everywhere else.

Every operator is a callable here and torch.ops.sfd.NAME; its docstring states what it computes. Usable alone: nothing
but torch is needed.
"""

from sfd_kernels.loading import backends, load_cpu_kernels
from sfd_kernels.ops.adamw_ema_step import adamw_ema_step
from sfd_kernels.ops.attention import attention
from sfd_kernels.ops.condition_silu import condition_silu
from sfd_kernels.ops.feature_alignment_loss import feature_alignment_loss
from sfd_kernels.ops.flow_matching_loss import flow_matching_loss
from sfd_kernels.ops.gated_residual_norm_modulate import gated_residual_norm_modulate
from sfd_kernels.ops.masked_velocity_update import masked_velocity_update
from sfd_kernels.ops.noise_latents import noise_latents
from sfd_kernels.ops.philox import philox_bits, philox_normal
from sfd_kernels.ops.qk_norm_rope import qk_norm_rope, split_qkv
from sfd_kernels.ops.rms_norm_modulate import rms_norm_modulate
from sfd_kernels.ops.swiglu import swiglu
from sfd_kernels.ops.timestep_features import timestep_features
from sfd_kernels.ops.total_norm import total_norm
from sfd_kernels.ops.transpose_with_sums import transpose_with_sums
from sfd_kernels.registry import reference_only

load_cpu_kernels()

__version__ = "0.1.0"
__all__ = [
    "adamw_ema_step",
    "attention",
    "backends",
    "condition_silu",
    "feature_alignment_loss",
    "flow_matching_loss",
    "gated_residual_norm_modulate",
    "masked_velocity_update",
    "noise_latents",
    "philox_bits",
    "philox_normal",
    "qk_norm_rope",
    "reference_only",
    "rms_norm_modulate",
    "split_qkv",
    "swiglu",
    "timestep_features",
    "total_norm",
    "transpose_with_sums",
]
