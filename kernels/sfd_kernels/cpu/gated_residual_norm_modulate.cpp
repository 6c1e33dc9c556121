// x_new = x + gate * branch; y = x_new / sqrt(mean(x_new^2) + eps) * weight * (1 + scale) + shift, forward and
// backward.
#include "norm.h"

namespace sfd {
struct GatedNormArgs {
  Dtype wide, narrow;       // of x, x_new and their gradients; of branch, y and their gradients
  const void *x, *branch;   // x: x_new in the backward pass
  const void *dx_new, *dy;  // backward
  Rows gate, weight, shift, scale;
  void *x_new, *y;                   // forward
  void *dx, *dbranch;                // backward
  float *products, *shifts, *gates;  // backward: partial sums, a row per task
  i64 tokens, width, tasks_per_sample;
  float eps;
  bool stream;
};
}  // namespace sfd

SFD_KERNEL(gated_norm_tasks, GatedNormArgs)
SFD_KERNEL(gated_norm_backward_tasks, GatedNormArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// x as it will be read back: rounded to its dtype.
template <class T>
SFD_INLINE vf rounded(vf v, const T* type) {
  return widen(narrow(v, type), type);
}
SFD_INLINE vf rounded(vf v, const float*) { return v; }

template <bool Stream, class Wide, class Narrow>
static void forward(const GatedNormArgs& a, i64 begin, i64 end) {
  const i64 d = a.width;
  SFD_SCRATCH(gain, d);
  SFD_SCRATCH(bias, d);
  SFD_SCRATCH(gate, d);
  SFD_SCRATCH(kept, d);
  for (i64 task = begin; task < end; ++task) {
    const i64 sample = task / a.tasks_per_sample, first = task % a.tasks_per_sample * kRowsPerTask;
    const i64 last = first + kRowsPerTask < a.tokens ? first + kRowsPerTask : a.tokens;
    modulation_gain(gain, a.weight, a.scale, sample, d);
    expand_row(bias, a.shift, sample, 0, d);
    expand_row(gate, a.gate, sample, 0, d);
    for (i64 row = sample * a.tokens + first; row < sample * a.tokens + last; ++row) {
      const Wide* x = static_cast<const Wide*>(a.x) + row * d;
      const Narrow* branch = static_cast<const Narrow*>(a.branch) + row * d;
      Wide* x_new = static_cast<Wide*>(a.x_new) + row * d;
      Narrow* y = static_cast<Narrow*>(a.y) + row * d;
      vf squares[4] = {};
      sweep<4>(d, [&](i64 i, auto lanes, int k) {
        prefetch(x + d + i);
        const vf sum = load(x + i, lanes) + load(gate + i, lanes) * load(branch + i, lanes);
        const vf v = rounded(sum, x);
        put<Stream>(x_new + i, v, lanes);
        store(kept + i, v, lanes);
        squares[k] += v * v;
      });
      const float rstd = rstd_of(sum(squares), d, a.eps);
      sweep(d, [&](i64 i, auto lanes) {
        prefetch(branch + d + i);
        put<Stream>(y + i, load(kept + i, lanes) * rstd * load(gain + i, lanes) + load(bias + i, lanes), lanes);
      });
    }
  }
}

template <bool Stream, class Wide, class Narrow>
static void backward(const GatedNormArgs& a, i64 begin, i64 end) {
  const i64 d = a.width;
  SFD_SCRATCH(gain, d);
  SFD_SCRATCH(gate, d);
  for (i64 task = begin; task < end; ++task) {
    const i64 sample = task / a.tasks_per_sample, first = task % a.tasks_per_sample * kRowsPerTask;
    const i64 last = first + kRowsPerTask < a.tokens ? first + kRowsPerTask : a.tokens;
    float *products = a.products + task * d, *shifts = a.shifts + task * d, *gates = a.gates + task * d;
    modulation_gain(gain, a.weight, a.scale, sample, d);
    expand_row(gate, a.gate, sample, 0, d);
    fill(products, 0.0f, d);
    fill(shifts, 0.0f, d);
    fill(gates, 0.0f, d);
    for (i64 row = sample * a.tokens + first; row < sample * a.tokens + last; ++row) {
      const Wide* x = static_cast<const Wide*>(a.x) + row * d;
      const Wide* dx_new = static_cast<const Wide*>(a.dx_new) + row * d;
      const Narrow* branch = static_cast<const Narrow*>(a.branch) + row * d;
      const Narrow* dy = static_cast<const Narrow*>(a.dy) + row * d;
      Wide* dx = static_cast<Wide*>(a.dx) + row * d;
      Narrow* dbranch = static_cast<Narrow*>(a.dbranch) + row * d;
      vf squares[4] = {}, inner[4] = {};
      sweep<4>(d, [&](i64 i, auto lanes, int k) {
        prefetch(x + d + i);
        prefetch(dy + d + i);
        const vf v = load(x + i, lanes);
        squares[k] += v * v;
        inner[k] += load(dy + i, lanes) * load(gain + i, lanes) * v;
      });
      const float rstd = rstd_of(sum(squares), d, a.eps);
      const float mean = sum(inner) * rstd / static_cast<float>(d);
      sweep(d, [&](i64 i, auto lanes) {
        prefetch(dx_new + d + i);
        prefetch(branch + d + i);
        const vf x_hat = load(x + i, lanes) * rstd, grad = load(dy + i, lanes);
        const vf total = load(dx_new + i, lanes) + rstd * (grad * load(gain + i, lanes) - x_hat * mean);
        put<Stream>(dx + i, total, lanes);
        put<Stream>(dbranch + i, load(gate + i, lanes) * total, lanes);
        store(products + i, load(products + i, lanes) + grad * x_hat, lanes);
        store(shifts + i, load(shifts + i, lanes) + grad, lanes);
        store(gates + i, load(gates + i, lanes) + load(branch + i, lanes) * total, lanes);
      });
    }
  }
}

void gated_norm_tasks(const GatedNormArgs& a, i64 begin, i64 end) {
  with_mix(a.wide, a.narrow, [&]<class Wide, class Narrow>(Wide*, Narrow*) {
    with_bool(a.stream, [&]<bool Stream>(Bool<Stream>) { forward<Stream, Wide, Narrow>(a, begin, end); });
  });
  fence();
}

void gated_norm_backward_tasks(const GatedNormArgs& a, i64 begin, i64 end) {
  with_mix(a.wide, a.narrow, [&]<class Wide, class Narrow>(Wide*, Narrow*) {
    with_bool(a.stream, [&]<bool Stream>(Bool<Stream>) { backward<Stream, Wide, Narrow>(a, begin, end); });
  });
  fence();
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static bool is_supported(const Tensor& x, const Tensor& branch, const Tensor& gate, const Tensor& weight,
                         const OptionalTensor& shift, const Tensor& scale) {
  if (x.dim() != 3 || x.size(2) > kMaxWidth || !is_mix(x, scale) || !same_dtype(branch, scale) ||
      !same_shape(branch, x) || !is_kernel_dtype(weight))
    return false;
  const i64 batch = x.size(0), width = x.size(2);
  return has_shape(weight, {width}) && is_row_per_sample(scale, batch, width) &&
         is_row_per_sample(gate, batch, width) && (!shift.has_value() || is_row_per_sample(*shift, batch, width));
}

static std::tuple<Tensor, Tensor> gated_residual_norm_modulate(Tensor x, Tensor branch, Tensor gate, Tensor weight,
                                                               OptionalTensor shift, Tensor scale, double eps) {
  if (!is_supported(x, branch, gate, weight, shift, scale))
    return reference<std::tuple<Tensor, Tensor> >("gated_residual_norm_modulate", x, branch, gate, weight, shift, scale,
                                                  eps);
  x = dense(x), branch = dense(branch), weight = dense(weight);
  gate = dense_rows(gate), shift = dense_rows(shift), scale = dense_rows(scale);
  const i64 batch = x.size(0), tokens = x.size(1), width = x.size(2), tasks = ceil_div(tokens, kRowsPerTask);
  const Tensor x_new = fresh_like(x), y = fresh({batch, tokens, width}, scale.scalar_type());
  GatedNormArgs args{};
  args.wide = dtype_of(x), args.narrow = dtype_of(y);
  args.x = pointer(x), args.branch = pointer(branch);
  args.gate = rows_of(gate), args.weight = rows_of(weight), args.shift = rows_of(shift), args.scale = rows_of(scale);
  args.x_new = output(x_new), args.y = output(y);
  args.tokens = tokens, args.width = width, args.tasks_per_sample = tasks, args.eps = static_cast<float>(eps);
  args.stream = should_stream(x_new, width) && should_stream(y, width);
  run(gated_norm_tasks, args, batch * tasks, grain(2 * kRowsPerTask * width));
  return {x_new, y};
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

static SixTensors gated_residual_norm_modulate_backward(Tensor dx_new, Tensor dy, Tensor x_new, Tensor branch,
                                                        Tensor gate, Tensor weight, Tensor scale, double eps) {
  if (!is_supported(x_new, branch, gate, weight, std::nullopt, scale) || !same_dtype(dx_new, x_new) ||
      !same_shape(dx_new, x_new) || !same_dtype(dy, scale) || !same_shape(dy, x_new))
    return reference<SixTensors>("gated_residual_norm_modulate_backward", dx_new, dy, x_new, branch, gate, weight,
                                 scale, eps);
  dx_new = dense(dx_new), dy = dense(dy), x_new = dense(x_new), branch = dense(branch), weight = dense(weight);
  gate = dense_rows(gate), scale = dense_rows(scale);
  const i64 batch = x_new.size(0), tokens = x_new.size(1), width = x_new.size(2);
  const i64 tasks = ceil_div(tokens, kRowsPerTask);
  const Tensor dx = fresh_like(x_new), dbranch = fresh_like(branch), dweight = fresh_like(weight);
  const Tensor dgate = fresh_like(gate), dshift = fresh_like(scale), dscale = fresh_like(scale);
  const Tensor partial = fresh({3, batch * tasks, width}, ScalarType::Float);
  GatedNormArgs args{};
  args.wide = dtype_of(x_new), args.narrow = dtype_of(branch);
  args.x = pointer(x_new), args.branch = pointer(branch), args.dx_new = pointer(dx_new), args.dy = pointer(dy);
  args.gate = rows_of(gate), args.weight = rows_of(weight), args.scale = rows_of(scale);
  args.dx = output(dx), args.dbranch = output(dbranch);
  args.products = output<float>(partial);
  args.shifts = args.products + batch * tasks * width, args.gates = args.shifts + batch * tasks * width;
  args.tokens = tokens, args.width = width, args.tasks_per_sample = tasks, args.eps = static_cast<float>(eps);
  args.stream = should_stream(dx, width) && should_stream(dbranch, width);
  run(gated_norm_backward_tasks, args, batch * tasks, grain(3 * kRowsPerTask * width));
  const NormReduceArgs reduce{.batch = batch,
                              .width = width,
                              .tasks_per_sample = tasks,
                              .weight = rows_of(weight),
                              .scale = rows_of(scale),
                              .products = args.products,
                              .shifts = args.shifts,
                              .gates = args.gates,
                              .dweight = output(dweight),
                              .dshift = output(dshift),
                              .dscale = output(dscale),
                              .dgate = output(dgate),
                              .dweight_dtype = dtype_of(weight),
                              .dscale_dtype = dtype_of(scale),
                              .dgate_dtype = dtype_of(gate)};
  run(norm_reduce, reduce, ceil_div(width, kReduceColumns), grain(3 * batch * tasks * kReduceColumns));
  return {dx, dbranch, dgate, dweight, dshift, dscale};
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) {
  m.impl("gated_residual_norm_modulate", TORCH_BOX(&sfd::gated_residual_norm_modulate));
  m.impl("gated_residual_norm_modulate_backward", TORCH_BOX(&sfd::gated_residual_norm_modulate_backward));
}
#endif
