"""A matrix transposed, and the sums of its columns. M rows, N columns.

The gradient of a Linear's weight is dy^T x, that of its bias the sums of dy's columns. On a CPU with AMX the product
runs at half the speed where dy is read transposed (oneDNN), and as fast as any with dy^T in memory.
"""

import torch
from torch import Tensor

from sfd_kernels.ops.common import accumulation_dtype
from sfd_kernels.registry import Op, elements


def transpose_with_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x^T, column sums) of x (M, N): (N, M) contiguous and (N,), both in the dtype of x; sums are taken in fp32."""
    if x.dim() != 2:
        raise ValueError(f"transpose_with_sums takes a matrix, not a tensor of shape {tuple(x.shape)}")
    return x.t().clone(memory_format=torch.contiguous_format), x.sum(0, dtype=accumulation_dtype(x)).to(x.dtype)


def _examples(make, size):
    yield "qkv", (make.narrow(size.batch * size.tokens, 3 * size.width),)
    if size.is_tiny:
        yield "strided rows", (make.narrow(size.batch * size.tokens, 2 * size.width)[:, : size.width],)
        yield "one row", (make.narrow(1, size.width),)


transpose_with_sums = Op(
    transpose_with_sums,
    examples=_examples,
    flops=elements(0, 1),
    on_cuda="cuBLAS, which reads a transposed operand at full speed",
)
