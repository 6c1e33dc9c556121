"""Freed memory that stays in the process: page faults of repeated large allocations are counted."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource
import torch
from sfd_fast.sampling.allocator import keep_freed_memory
kept = keep_freed_memory() if {keep} else None
for _ in range(5):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(10_000_000)  # 40 MB, freed at once; glibc returns blocks from 32 MiB on to the kernel
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", COUNT.format(keep=keep)], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_spares_the_page_faults_of_large_tensors():
    kept, count = faults(keep=True)
    assert kept == "True"
    _, plain = faults(keep=False)
    assert count < plain / 4


def test_another_c_library_is_left_alone(monkeypatch):
    from sfd_fast.sampling import allocator as memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False
