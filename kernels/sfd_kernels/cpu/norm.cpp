// The operators rms_norm_modulate and gated_residual_norm_modulate, forward and backward, on the kernels of norm.h.
#include "norm.h"

#ifndef SFD_ISA
namespace sfd {

static Rows rows_of(const Tensor& t) { return {pointer(t), t.dim() == 1 ? 0 : t.stride(0), dtype_of(t)}; }

// (B, D) of a kernel's dtype.
static bool is_row_per_sample(const Tensor& t, const Tensor& x) {
  return is_kernel_dtype(t) && has_shape(t, {x.size(0), x.size(2)});
}

static bool is_supported(const Tensor& x, const Tensor& weight, const OptionalTensor& shift, const Tensor& scale) {
  return x.dim() == 3 && x.size(2) <= kMaxWidth && is_mix(x, scale) && is_kernel_dtype(weight) &&
         has_shape(weight, {x.size(2)}) && is_row_per_sample(scale, x) &&
         (!shift.has_value() || is_row_per_sample(*shift, x));
}

static bool is_supported_branch(const Tensor& x, const Tensor& branch, const Tensor& gate, const Tensor& scale) {
  return same_dtype(branch, scale) && same_shape(branch, x) && is_row_per_sample(gate, x);
}

// The tensors become contiguous (in their rows) here and must outlive the arguments.
static NormArgs arguments(Tensor& x, Tensor& weight, Tensor& scale, double eps) {
  x = dense(x), weight = dense(weight), scale = dense_rows(scale);
  NormArgs args{};
  args.wide = dtype_of(x), args.narrow = dtype_of(scale);
  args.x = pointer(x), args.weight = rows_of(weight), args.scale = rows_of(scale);
  args.tokens = x.size(1), args.width = x.size(2), args.tasks_per_sample = ceil_div(args.tokens, kRowsPerTask);
  args.eps = static_cast<float>(eps);
  return args;
}

static void add_branch(NormArgs& args, Tensor& branch, Tensor& gate) {
  branch = dense(branch), gate = dense_rows(gate);
  args.branch = pointer(branch), args.gate = rows_of(gate);
}

static Tensor run_forward(NormArgs& args, const Tensor& x, OptionalTensor shift, ScalarType dtype, i64 streams) {
  if (shift.has_value()) shift = dense_rows(*shift), args.shift = rows_of(*shift);
  const Tensor y = fresh({x.size(0), args.tokens, args.width}, dtype);
  args.y = output(y), args.stream = args.stream && should_stream(y, args.width);
  run(norm_tasks, args, x.size(0) * args.tasks_per_sample, grain(streams * kRowsPerTask * args.width));
  return y;
}

// (dweight, dshift, dscale), and dgate where it is given, by way of partial sums.
static std::array<Tensor, 3> run_backward(NormArgs& args, const Tensor& weight, const Tensor& scale, i64 batch,
                                          const OptionalTensor& dgate) {
  const i64 num_sums = dgate.has_value() ? 3 : 2, tasks = batch * args.tasks_per_sample;
  const Tensor partial = fresh({num_sums, tasks, args.width}, ScalarType::Float);
  args.products = output<float>(partial);
  args.shifts = args.products + tasks * args.width, args.gates = args.shifts + tasks * args.width;
  run(norm_backward_tasks, args, tasks, grain(num_sums * kRowsPerTask * args.width));
  std::array<Tensor, 3> grads{fresh_like(weight), fresh_like(scale), fresh_like(scale)};
  const NormReduceArgs reduce{.norm = &args,
                              .batch = batch,
                              .dweight = output(grads[0]),
                              .dshift = output(grads[1]),
                              .dscale = output(grads[2]),
                              .dgate = dgate.has_value() ? output(*dgate) : nullptr};
  run(norm_reduce, reduce, ceil_div(args.width, kReduceColumns), grain(num_sums * tasks * kReduceColumns));
  return grads;
}

static Tensor rms_norm_modulate(Tensor x, Tensor weight, OptionalTensor shift, Tensor scale, double eps) {
  if (!is_supported(x, weight, shift, scale))
    return reference<Tensor>("rms_norm_modulate", x, weight, shift, scale, eps);
  NormArgs args = arguments(x, weight, scale, eps);
  args.stream = true;
  return run_forward(args, x, shift, scale.scalar_type(), 1);
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_modulate_backward(Tensor dy, Tensor x, Tensor weight,
                                                                             Tensor scale, double eps) {
  if (!is_supported(x, weight, std::nullopt, scale) || !same_dtype(dy, scale) || !same_shape(dy, x))
    return reference<std::tuple<Tensor, Tensor, Tensor, Tensor> >("rms_norm_modulate_backward", dy, x, weight, scale,
                                                                  eps);
  NormArgs args = arguments(x, weight, scale, eps);
  dy = dense(dy);
  const Tensor dx = fresh_like(x);
  args.dy = pointer(dy), args.dx = output(dx), args.stream = should_stream(dx, args.width);
  const auto [dweight, dshift, dscale] = run_backward(args, weight, scale, x.size(0), std::nullopt);
  return {dx, dweight, dshift, dscale};
}

static std::tuple<Tensor, Tensor> gated_residual_norm_modulate(Tensor x, Tensor branch, Tensor gate, Tensor weight,
                                                               OptionalTensor shift, Tensor scale, double eps) {
  if (!is_supported(x, weight, shift, scale) || !is_supported_branch(x, branch, gate, scale))
    return reference<std::tuple<Tensor, Tensor> >("gated_residual_norm_modulate", x, branch, gate, weight, shift, scale,
                                                  eps);
  NormArgs args = arguments(x, weight, scale, eps);
  add_branch(args, branch, gate);
  const Tensor x_new = fresh_like(x);
  args.x_new = output(x_new), args.stream = should_stream(x_new, args.width);
  return {x_new, run_forward(args, x, shift, scale.scalar_type(), 2)};
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

static SixTensors gated_residual_norm_modulate_backward(Tensor dx_new, Tensor dy, Tensor x_new, Tensor branch,
                                                        Tensor gate, Tensor weight, Tensor scale, double eps) {
  if (!is_supported(x_new, weight, std::nullopt, scale) || !is_supported_branch(x_new, branch, gate, scale) ||
      !same_dtype(dx_new, x_new) || !same_shape(dx_new, x_new) || !same_dtype(dy, scale) || !same_shape(dy, x_new))
    return reference<SixTensors>("gated_residual_norm_modulate_backward", dx_new, dy, x_new, branch, gate, weight,
                                 scale, eps);
  NormArgs args = arguments(x_new, weight, scale, eps);
  add_branch(args, branch, gate);
  dx_new = dense(dx_new), dy = dense(dy);
  const Tensor dx = fresh_like(x_new), dbranch = fresh_like(branch), dgate = fresh_like(gate);
  args.dx_new = pointer(dx_new), args.dy = pointer(dy), args.dx = output(dx), args.dbranch = output(dbranch);
  args.stream = should_stream(dx, args.width) && should_stream(dbranch, args.width);
  const auto [dweight, dshift, dscale] = run_backward(args, weight, scale, x_new.size(0), dgate);
  return {dx, dbranch, dgate, dweight, dshift, dscale};
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) {
  m.impl("rms_norm_modulate", TORCH_BOX(&sfd::rms_norm_modulate));
  m.impl("rms_norm_modulate_backward", TORCH_BOX(&sfd::rms_norm_modulate_backward));
  m.impl("gated_residual_norm_modulate", TORCH_BOX(&sfd::gated_residual_norm_modulate));
  m.impl("gated_residual_norm_modulate_backward", TORCH_BOX(&sfd::gated_residual_norm_modulate_backward));
}
#endif
