// y = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift, forward and backward.
#include "norm.h"

namespace sfd {
struct RmsNormArgs {
  Dtype x_dtype, y_dtype;
  const void *x, *dy;
  Rows weight, shift, scale;
  void* out;                 // y, or dx
  float *products, *shifts;  // backward: partial sums, a row per task
  i64 tokens, width, tasks_per_sample;
  float eps;
  bool stream;
};
}  // namespace sfd

SFD_KERNEL(rms_norm_tasks, RmsNormArgs)
SFD_KERNEL(rms_norm_backward_tasks, RmsNormArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

template <bool Stream, class X, class Y>
static void forward(const RmsNormArgs& a, i64 begin, i64 end) {
  const i64 d = a.width;
  SFD_SCRATCH(gain, d);
  SFD_SCRATCH(bias, d);
  for (i64 task = begin; task < end; ++task) {
    const i64 sample = task / a.tasks_per_sample, first = task % a.tasks_per_sample * kRowsPerTask;
    const i64 last = first + kRowsPerTask < a.tokens ? first + kRowsPerTask : a.tokens;
    modulation_gain(gain, a.weight, a.scale, sample, d);
    expand_row(bias, a.shift, sample, 0, d);
    for (i64 row = sample * a.tokens + first; row < sample * a.tokens + last; ++row) {
      const X* x = static_cast<const X*>(a.x) + row * d;
      Y* y = static_cast<Y*>(a.out) + row * d;
      vf squares[4] = {};
      sweep<4>(d, [&](i64 i, auto lanes, int k) {
        const vf v = load(x + i, lanes);
        squares[k] += v * v;
      });
      const float rstd = rstd_of(sum(squares), d, a.eps);
      sweep(d, [&](i64 i, auto lanes) {
        prefetch(x + d + i);
        put<Stream>(y + i, load(x + i, lanes) * rstd * load(gain + i, lanes) + load(bias + i, lanes), lanes);
      });
    }
  }
}

// One pass over a row for its two sums, one for dx and the column sums; the second finds the row in the L1 cache. Each
// fetches one of the next row's two streams: spread over both, the loads in flight limit neither.
template <bool Stream, class X, class Y>
static void backward(const RmsNormArgs& a, i64 begin, i64 end) {
  const i64 d = a.width;
  SFD_SCRATCH(gain, d);
  for (i64 task = begin; task < end; ++task) {
    const i64 sample = task / a.tasks_per_sample, first = task % a.tasks_per_sample * kRowsPerTask;
    const i64 last = first + kRowsPerTask < a.tokens ? first + kRowsPerTask : a.tokens;
    float *products = a.products + task * d, *shifts = a.shifts + task * d;
    modulation_gain(gain, a.weight, a.scale, sample, d);
    fill(products, 0.0f, d);
    fill(shifts, 0.0f, d);
    for (i64 row = sample * a.tokens + first; row < sample * a.tokens + last; ++row) {
      const X* x = static_cast<const X*>(a.x) + row * d;
      const Y* dy = static_cast<const Y*>(a.dy) + row * d;
      X* dx = static_cast<X*>(a.out) + row * d;
      vf squares[4] = {}, inner[4] = {};
      sweep<4>(d, [&](i64 i, auto lanes, int k) {
        prefetch(x + d + i);
        const vf v = load(x + i, lanes);
        squares[k] += v * v;
        inner[k] += load(dy + i, lanes) * load(gain + i, lanes) * v;
      });
      const float rstd = rstd_of(sum(squares), d, a.eps);
      const float mean = sum(inner) * rstd / static_cast<float>(d);
      sweep(d, [&](i64 i, auto lanes) {
        prefetch(dy + d + i);
        const vf x_hat = load(x + i, lanes) * rstd, grad = load(dy + i, lanes);
        put<Stream>(dx + i, rstd * (grad * load(gain + i, lanes) - x_hat * mean), lanes);
        store(products + i, load(products + i, lanes) + grad * x_hat, lanes);
        store(shifts + i, load(shifts + i, lanes) + grad, lanes);
      });
    }
  }
}

void rms_norm_tasks(const RmsNormArgs& a, i64 begin, i64 end) {
  with_mix(a.x_dtype, a.y_dtype, [&]<class X, class Y>(X*, Y*) {
    with_bool(a.stream, [&]<bool Stream>(Bool<Stream>) { forward<Stream, X, Y>(a, begin, end); });
  });
  fence();
}

void rms_norm_backward_tasks(const RmsNormArgs& a, i64 begin, i64 end) {
  with_mix(a.x_dtype, a.y_dtype, [&]<class X, class Y>(X*, Y*) {
    with_bool(a.stream, [&]<bool Stream>(Bool<Stream>) { backward<Stream, X, Y>(a, begin, end); });
  });
  fence();
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static bool is_supported(const Tensor& x, const Tensor& weight, const OptionalTensor& shift, const Tensor& scale) {
  if (x.dim() != 3 || x.size(2) > kMaxWidth || !is_mix(x, scale) || !is_kernel_dtype(weight)) return false;
  const i64 batch = x.size(0), width = x.size(2);
  return has_shape(weight, {width}) && is_row_per_sample(scale, batch, width) &&
         (!shift.has_value() || is_row_per_sample(*shift, batch, width));
}

static Tensor rms_norm_modulate(Tensor x, Tensor weight, OptionalTensor shift, Tensor scale, double eps) {
  if (!is_supported(x, weight, shift, scale))
    return reference<Tensor>("rms_norm_modulate", x, weight, shift, scale, eps);
  x = dense(x), weight = dense(weight), shift = dense_rows(shift), scale = dense_rows(scale);
  const i64 tokens = x.size(1), width = x.size(2), tasks = ceil_div(tokens, kRowsPerTask);
  const Tensor y = fresh({x.size(0), tokens, width}, scale.scalar_type());
  const RmsNormArgs args{.x_dtype = dtype_of(x),
                         .y_dtype = dtype_of(y),
                         .x = pointer(x),
                         .dy = nullptr,
                         .weight = rows_of(weight),
                         .shift = rows_of(shift),
                         .scale = rows_of(scale),
                         .out = output(y),
                         .products = nullptr,
                         .shifts = nullptr,
                         .tokens = tokens,
                         .width = width,
                         .tasks_per_sample = tasks,
                         .eps = static_cast<float>(eps),
                         .stream = should_stream(y, width)};
  run(rms_norm_tasks, args, x.size(0) * tasks, grain(kRowsPerTask * width));
  return y;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_modulate_backward(Tensor dy, Tensor x, Tensor weight,
                                                                             Tensor scale, double eps) {
  if (!is_supported(x, weight, std::nullopt, scale) || !same_dtype(dy, scale) || !same_shape(dy, x))
    return reference<std::tuple<Tensor, Tensor, Tensor, Tensor> >("rms_norm_modulate_backward", dy, x, weight, scale,
                                                                  eps);
  dy = dense(dy), x = dense(x), weight = dense(weight), scale = dense_rows(scale);
  const i64 batch = x.size(0), tokens = x.size(1), width = x.size(2), tasks = ceil_div(tokens, kRowsPerTask);
  const Tensor dx = fresh_like(x), dweight = fresh_like(weight);
  const Tensor dshift = fresh({batch, width}, scale.scalar_type()), dscale = fresh({batch, width}, scale.scalar_type());
  const Tensor partial = fresh({2, batch * tasks, width}, ScalarType::Float);
  float* products = output<float>(partial);
  float* shifts = products + batch * tasks * width;
  const RmsNormArgs args{.x_dtype = dtype_of(x),
                         .y_dtype = dtype_of(dy),
                         .x = pointer(x),
                         .dy = pointer(dy),
                         .weight = rows_of(weight),
                         .shift = {},
                         .scale = rows_of(scale),
                         .out = output(dx),
                         .products = products,
                         .shifts = shifts,
                         .tokens = tokens,
                         .width = width,
                         .tasks_per_sample = tasks,
                         .eps = static_cast<float>(eps),
                         .stream = should_stream(dx, width)};
  run(rms_norm_backward_tasks, args, batch * tasks, grain(2 * kRowsPerTask * width));
  const NormReduceArgs reduce{.batch = batch,
                              .width = width,
                              .tasks_per_sample = tasks,
                              .weight = rows_of(weight),
                              .scale = rows_of(scale),
                              .products = products,
                              .shifts = shifts,
                              .gates = nullptr,
                              .dweight = output(dweight),
                              .dshift = output(dshift),
                              .dscale = output(dscale),
                              .dgate = nullptr,
                              .dweight_dtype = dtype_of(weight),
                              .dscale_dtype = dtype_of(scale),
                              .dgate_dtype = dtype_of(scale)};
  run(norm_reduce, reduce, ceil_div(width, kReduceColumns), grain(2 * batch * tasks * kReduceColumns));
  return {dx, dweight, dshift, dscale};
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) {
  m.impl("rms_norm_modulate", TORCH_BOX(&sfd::rms_norm_modulate));
  m.impl("rms_norm_modulate_backward", TORCH_BOX(&sfd::rms_norm_modulate_backward));
}
#endif
