// What both norms share: RMSNorm of a row, its modulation, and the reductions of its backward pass.
//
// The rows of a sample are cut into tasks of kRowsPerTask rows. A backward task writes one row of partial sums for each
// reduced gradient; norm_reduce adds them in order of tasks and samples, whatever threads computed them.
#pragma once

#include "kernel.h"

namespace sfd {

inline constexpr i64 kRowsPerTask = 32;

// One row (D,) of each sample: element (b, d) at data + b * stride + d; stride 0 for a weight. data may be null.
struct Rows {
  const void* data;
  i64 stride;
  Dtype dtype;
};

struct NormReduceArgs {
  i64 batch, width, tasks_per_sample;
  Rows weight, scale;
  // per task (width,): sums of dy x_hat, of dy, and of branch dx (null without a gate)
  const float *products, *shifts, *gates;
  void *dweight, *dshift, *dscale, *dgate;
  Dtype dweight_dtype, dscale_dtype, dgate_dtype;
};

}  // namespace sfd

SFD_KERNEL(norm_reduce, NormReduceArgs)

namespace sfd {
inline constexpr i64 kReduceColumns = 256;  // per task of norm_reduce
}

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// to = the sample's row as floats, or zeros if there is none.
SFD_INLINE void expand_row(float* to, const Rows& rows, i64 sample, i64 offset, i64 n) {
  if (rows.data == nullptr) return fill(to, 0.0f, n);
  expand(to, at(rows.data, rows.dtype, sample * rows.stride + offset), rows.dtype, n);
}

// to = weight (1 + scale) of a sample.
SFD_INLINE void modulation_gain(float* to, const Rows& weight, const Rows& scale, i64 sample, i64 n) {
  SFD_SCRATCH(weights, n);
  expand_row(weights, weight, sample, 0, n);
  expand_row(to, scale, sample, 0, n);
  sweep(n, [&](i64 i, auto lanes) { store(to + i, load(weights + i, lanes) * (1.0f + load(to + i, lanes)), lanes); });
}

SFD_INLINE float rstd_of(float sum_of_squares, i64 n, float eps) {
  return 1.0f / __builtin_sqrtf(sum_of_squares / static_cast<float>(n) + eps);
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

inline Rows rows_of(const Tensor& t) { return {pointer(t), t.dim() == 1 ? 0 : t.stride(0), dtype_of(t)}; }
inline Rows rows_of(const OptionalTensor& t) { return t.has_value() ? rows_of(*t) : Rows{nullptr, 0, Dtype::f32}; }
inline OptionalTensor dense_rows(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(dense_rows(*t)) : OptionalTensor();
}

// (B, D) of a kernel's dtype.
inline bool is_row_per_sample(const Tensor& t, i64 batch, i64 width) {
  return is_kernel_dtype(t) && has_shape(t, {batch, width});
}

}  // namespace sfd
#endif
