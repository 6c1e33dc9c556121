"""1 / |x| as the cosine losses define it, from the squared norm."""

import triton
import triton.language as tl


@triton.jit
def inverse_norm(squared):
    """1 / sqrt(squared), and 0 for a norm of at most 1e-8: a zero vector has cosine 0 and no gradient."""
    nonzero = squared > 1e-16
    return tl.where(nonzero, tl.rsqrt(tl.where(nonzero, squared, 1.0)), 0.0)
