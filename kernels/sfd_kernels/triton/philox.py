"""philox_bits and philox_normal: counter-based numbers, 4 words for each counter. B samples."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfd_kernels.ops.philox import philox_bits, philox_normal
from sfd_kernels.triton.launch import ceil_div, launch

# 256 counters on 4 warps: 2 for each thread, whose words leave in 128-bit stores. 48 x 16 x 16 numbers are 12 programs
# a sample: 384 at batch 32. Bound by integer products and, for normals, fp64 arithmetic: not by memory.
COUNTERS, NUM_WARPS = 256, 4


@triton.jit
def _words(sample_ids, sample, counters, seed_low, seed_high, stream):
    """Philox4x32-10 of counter (j, stream, id low, id high), key (seed low, seed high): four uint32 blocks."""
    identity = tl.load(sample_ids + sample)
    c0 = counters.to(tl.uint32)
    zero = c0 * 0
    c1 = zero + stream.to(tl.uint32)
    c2 = zero + identity.to(tl.uint32)
    c3 = zero + (identity >> 32).to(tl.uint32)
    k0 = zero + seed_low.to(tl.uint32)
    k1 = zero + seed_high.to(tl.uint32)
    first = zero + 0xD2511F53
    second = zero + 0xCD9E8D57
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, first)
        high1 = tl.umulhi(c2, second)
        low0 = c0 * first
        low1 = c2 * second
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _four(a, b, c, d):
    """Four blocks of n values -> 4 n values, those of one counter adjacent."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0] * 4,))


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream"])
def _bits(sample_ids, out, seed_low, seed_high, stream, count, blocks, COUNTERS: tl.constexpr):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks * COUNTERS
    a, b, c, d = _words(sample_ids, sample, block + tl.arange(0, COUNTERS), seed_low, seed_high, stream)
    columns = block * 4 + tl.arange(0, 4 * COUNTERS)
    tl.store(out + sample * count + columns, _four(a, b, c, d).to(tl.int64), mask=columns < count)


@triton.jit
def _box_muller(a, b):
    """Normals r cos(p) and r sin(p) from two words, in fp64, rounded to fp32."""
    radius = tl.sqrt(-2.0 * tl.log((a.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
    angle = (b.to(tl.float64) + 0.5) * (2.3283064365386963e-10 * 6.283185307179586)
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream"])
def _normal(sample_ids, out, seed_low, seed_high, stream, count, blocks, COUNTERS: tl.constexpr):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks * COUNTERS
    a, b, c, d = _words(sample_ids, sample, block + tl.arange(0, COUNTERS), seed_low, seed_high, stream)
    n0, n1 = _box_muller(a, b)
    n2, n3 = _box_muller(c, d)
    columns = block * 4 + tl.arange(0, 4 * COUNTERS)
    tl.store(out + sample * count + columns, _four(n0, n1, n2, n3), mask=columns < count)


def _launch(kernel, sample_ids: Tensor, seed: int, stream: int, count: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty((len(sample_ids), count), dtype=dtype, device=sample_ids.device)
    if out.numel():
        blocks = ceil_div(count, 4 * COUNTERS)
        # 32-bit halves as signed: Triton would otherwise give an argument over 2^31 a type, and so a kernel, of its
        # own.
        low, high, stream = (_signed(value) for value in (seed, seed >> 32, stream))
        launch(
            kernel, len(sample_ids) * blocks, sample_ids.contiguous(), out, low, high, stream, count, blocks,
            COUNTERS=COUNTERS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def _signed(word: int) -> int:
    """The low 32 bits of word as a signed 32-bit integer."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@philox_bits.triton
def bits(sample_ids: Tensor, seed: int, stream: int, count: int) -> Tensor:
    return _launch(_bits, sample_ids, seed, stream, count, torch.int64)


@philox_normal.triton
def normal(sample_ids: Tensor, seed: int, stream: int, count: int) -> Tensor:
    return _launch(_normal, sample_ids, seed, stream, count, torch.float32)
