// y = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift, forward and backward; gated, x is x + gate * branch,
// which is returned too.
//
// The rows of a sample are cut into tasks of kRowsPerTask rows. A backward task writes one row of partial sums for each
// reduced gradient; norm_reduce adds them in order of tasks and samples, whatever threads computed them.
#pragma once

#include "kernel.h"

namespace sfd {

inline constexpr i64 kRowsPerTask = 32;
inline constexpr i64 kReduceColumns = 256;  // per task of norm_reduce

// One row (D,) of each sample: element (b, d) at data + b * stride + d; stride 0 for a weight. data may be null.
struct Rows {
  const void* data;
  i64 stride;
  Dtype dtype;
};

struct NormArgs {
  Dtype wide, narrow;       // of x, x_new and their gradients; of branch, y and their gradients
  const void *x, *branch;   // x: x_new in the backward pass; no branch: nothing is added
  const void *dx_new, *dy;  // backward
  Rows gate, weight, shift, scale;
  void *x_new, *y;                   // forward
  void *dx, *dbranch;                // backward
  float *products, *shifts, *gates;  // backward: partial sums, a row per task, of dy x_hat, dy and branch dx
  i64 tokens, width, tasks_per_sample;
  float eps;
  bool stream;
};

struct NormReduceArgs {
  const NormArgs* norm;
  i64 batch;
  void *dweight, *dshift, *dscale, *dgate;
};

}  // namespace sfd

SFD_KERNEL(norm_tasks, NormArgs)
SFD_KERNEL(norm_backward_tasks, NormArgs)
SFD_KERNEL(norm_reduce, NormReduceArgs)
