"""Freed memory stays in the process. Without that every large CPU tensor costs page faults at each operation.

glibc takes blocks of 32 MiB and more from the kernel one by one and gives them back when they are freed, so a network
on a CPU has the same pages zeroed at every layer. Keeping them is what CUDA's caching allocator does for GPUs.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """From now on the C library keeps freed blocks for reuse: the process holds its peak until it ends.

    Does nothing, and returns False, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
