"""What every launch function needs: the dtypes that kernels take, readable strides, the launch on a tensor's device."""

from typing import Any

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""dtypes that the kernels load, in any mix; they compute in float32. float64 goes to the reference."""


def ceil_div(a: int, b: int) -> int:
    """Quotient rounded up. triton.cdiv takes 1.6 us for it, since kernels may call it too."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def supported(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: floating point of at most 32 bits."""
    return all(tensor is None or tensor.dtype in FLOATS for tensor in tensors)


def packed_last(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense, as rows of a packed tensor are; else a copy.

    Also a copy where offsets within one sample pass 2^31: kernels keep the sample's offset in int64, the rest in int32.
    """
    dense = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:]))
    return tensor if dense and reach < 2**31 else tensor.contiguous()


def _first_tensor(args: tuple) -> Tensor:
    first = args[0]
    return first if isinstance(first, Tensor) else _first_tensor(first)


def launch(kernel: Any, num_programs: int, *args: Any, **meta: Any) -> None:
    """Launches kernel on a one-dimensional grid, on the device of its first argument, a tensor or a tuple of them."""
    device = _first_tensor(args).device
    if device.type == "cuda" and device.index != triton.runtime.driver.active.get_current_device():
        with torch.cuda.device(device):
            kernel[(num_programs,)](*args, **meta)
    else:
        kernel[(num_programs,)](*args, **meta)
