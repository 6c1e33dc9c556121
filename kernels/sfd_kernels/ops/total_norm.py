"""The 2-norm of many tensors together, as clipping wants it of all gradients."""

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype
from sfd_kernels.registry import Op


def total_norm(tensors: list[Tensor]) -> Tensor:
    """sqrt of the sum of all squares, 0-dim float32 (float64 where a tensor is); 0 of no tensors.

    Of 16-bit tensors too the squares are added in float32; torch.nn.utils.get_total_norm rounds the norm of each to its
    own dtype.
    """
    dtype = accumulation_dtype(*tensors)
    device = tensors[0].device if tensors else None
    norms = [torch.linalg.vector_norm(tensor, dtype=dtype).to(device) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=dtype)


def _examples(make, size):
    d, h = size.width, size.hidden
    shapes = [(5, 7), (1,), (129,), (0,)] if size.is_tiny else [(3 * d, d), (3 * d,), (2 * h, d), (d, h), (6 * d, d)]
    yield "gradients", ([make.narrow(*shape) for shape in shapes],)
    if size.is_tiny:
        yield "mixed", ([make.narrow(40, 3), make.wide(17)],)


total_norm = Op(
    total_norm,
    examples=_examples,
    flops=lambda tensors: 2 * sum(tensor.numel() for tensor in tensors),
    constants=("tensors",),
    on_cuda="torch._foreach_norm, a few launches for all",
)
