"""What makes two runs of the same training steps equal to the bit on CUDA, as they are on a CPU without it."""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Inside, torch takes only algorithms that sum in a fixed order; an operation without one raises RuntimeError.

    Attention is what it is for: without it torch may take cuDNN's on Hopper, whose backward pass sums in any order, as
    flash-attention's does by default; inside, torch passes over the first and runs the second in order. cuBLAS gets the
    fixed workspace that torch asks for. Fresh memory stays as it is: our kernels write all that they return.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
