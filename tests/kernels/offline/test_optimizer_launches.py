"""What the optimizer's step launches for a whole network: how often, how many compiled kernels, in which accesses."""

import importlib.util

import pytest
import torch
from sfd_kernels.registry import INTERPRET, OPS

from sfd_fast.config.presets import XL
from sfd_fast.models.dit import LightningDiT

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"),
    pytest.mark.skipif(INTERPRET, reason="compiles kernels; TRITON_INTERPRET=1 makes them interpreted functions"),
]


def launches(shapes, *, copies=False, first_element=0):
    """Launches for tensors of these shapes; gradients are views that start at that element of a storage."""
    from sfd_kernels.offline.compile import record
    from torch._subclasses.fake_tensor import FakeTensorMode

    def tensors(offset=0, dtype=torch.float32):
        flat = [torch.empty(torch.Size(s).numel() + offset, dtype=dtype, device="cuda:0") for s in shapes]
        strides = [torch.empty(s, device="meta").stride() for s in shapes]
        return [t.as_strided(s, stride, offset) for t, s, stride in zip(flat, shapes, strides)]

    with FakeTensorMode():
        lists = tensors(), tensors(first_element), tensors(), tensors(), tensors()
        narrow = tensors(dtype=torch.bfloat16) if copies else []
        scalars = [torch.empty((), device="cuda:0") for _ in range(5)]
        return record(OPS["adamw_ema_step"], (*lists, narrow, *scalars, 0.9, 0.999, 1e-8, 0.01))


@pytest.mark.parametrize("copies", [False, True])
def test_xl_is_seven_launches_of_one_compiled_kernel_in_128_bit_accesses(copies):
    with torch.device("meta"):
        shapes = [p.shape for p in LightningDiT(XL).parameters() if p.requires_grad]
    assert len(shapes) == 414
    compiled = [launch.compile(90) for launch in launches(shapes, copies=copies)]
    assert len(compiled) == 7
    assert len({kernel.kernel.hash for kernel in compiled}) == 1
    assert {bits for kernel in compiled for bits in kernel.large_access_bits.values()} == {128}
    assert [kernel.stack_bytes for kernel in compiled] == [0] * 7


def test_odd_sizes_and_odd_addresses_compile_one_kernel_more_each():
    shapes = [(1 << 20,), ((1 << 20) + 1,), (1 << 20,), (3 << 10,), ((1 << 20) + 5,)]
    whole = {launch.compile(90).kernel.hash for launch in launches(shapes)}
    shifted = {launch.compile(90).kernel.hash for launch in launches(shapes, first_element=1)}
    assert len(whole) == len(shifted) == 2 and not whole & shifted


def test_accesses_of_tensors_that_eight_does_not_divide_are_narrower():
    """So that the check of 128 bits can fail."""
    (launch,) = launches([((1 << 20) + 1,)])
    assert set(launch.compile(90).large_access_bits.values()) == {32}
