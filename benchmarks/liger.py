"""Liger-Kernel's counterparts of our operators, on tensors of the layout that Liger is written for."""

from collections.abc import Callable

import torch


def liger_call(name: str, args: tuple) -> tuple[Callable, tuple] | None:
    """Liger's function and its arguments for operator `name` called with args; None where Liger has no such operator.

    Liger writes modulated norms in the dtype of x, where ours writes the dtype of scale.
    Raises ImportError where liger-kernel is not installed.
    """
    if name == "swiglu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply, tuple(half.contiguous() for half in args[0].chunk(2, dim=-1))
    if name == "rms_norm_modulate":
        from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

        x, weight, shift, scale, eps = args

        def modulated(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor):
            return LigerModulatedRMSNormFunction.apply(x, weight, scale, shift, eps, 0.0, "llama", False)

        return modulated, (x, weight, scale.contiguous(), shift.contiguous())
    return None
