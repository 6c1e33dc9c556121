// SiLU(cat[e_sem, e_tex] + e_label), forward and backward: small, worth a kernel for the calls that it saves.
#include "kernel.h"

namespace sfd {
struct ConditionArgs {
  Dtype sem_dtype, tex_dtype, label_dtype, out_dtype;
  const void *sem, *tex, *label;  // (B, half), (B, width - half) or null, (B, width)
  const void* dy;
  void *out, *dsem, *dtex, *dlabel;
  i64 half, width;  // half == width with one clock
};
}  // namespace sfd

SFD_KERNEL(condition_silu_rows, ConditionArgs)
SFD_KERNEL(condition_silu_backward_rows, ConditionArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

SFD_INLINE void condition(const ConditionArgs& a, i64 row, float* c, float* scratch) {
  const i64 rest = a.width - a.half;
  expand(c, at(a.sem, a.sem_dtype, row * a.half), a.sem_dtype, a.half);
  if (rest > 0) expand(c + a.half, at(a.tex, a.tex_dtype, row * rest), a.tex_dtype, rest);
  expand(scratch, at(a.label, a.label_dtype, row * a.width), a.label_dtype, a.width);
  sweep(a.width, [&](i64 i, auto lanes) { store(c + i, load(c + i, lanes) + load(scratch + i, lanes), lanes); });
}

void condition_silu_rows(const ConditionArgs& a, i64 begin, i64 end) {
  SFD_SCRATCH(c, a.width);
  SFD_SCRATCH(scratch, a.width);
  for (i64 row = begin; row < end; ++row) {
    condition(a, row, c, scratch);
    sweep(a.width, [&](i64 i, auto lanes) {
      const vf x = load(c + i, lanes);
      store(c + i, x / (1.0f + exp(-x)), lanes);
    });
    contract(at(a.out, a.out_dtype, row * a.width), a.out_dtype, c, a.width);
  }
}

void condition_silu_backward_rows(const ConditionArgs& a, i64 begin, i64 end) {
  SFD_SCRATCH(c, a.width);
  SFD_SCRATCH(scratch, a.width);
  const i64 rest = a.width - a.half;
  for (i64 row = begin; row < end; ++row) {
    condition(a, row, c, scratch);
    expand(scratch, at(a.dy, a.out_dtype, row * a.width), a.out_dtype, a.width);
    sweep(a.width, [&](i64 i, auto lanes) {
      const vf x = load(c + i, lanes), s = sigmoid(x);
      store(c + i, load(scratch + i, lanes) * s * (1.0f + x * (1.0f - s)), lanes);
    });
    contract(at(a.dsem, a.sem_dtype, row * a.half), a.sem_dtype, c, a.half);
    if (rest > 0) contract(at(a.dtex, a.tex_dtype, row * rest), a.tex_dtype, c + a.half, rest);
    contract(at(a.dlabel, a.label_dtype, row * a.width), a.label_dtype, c, a.width);
  }
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

static bool is_supported(const Tensor& sem, const OptionalTensor& tex, const Tensor& label) {
  if (sem.dim() != 2 || label.dim() != 2 || !is_kernel_dtype(sem) || !is_kernel_dtype(label) || label.size(1) > kMaxWidth)
    return false;
  const i64 batch = label.size(0), rest = label.size(1) - sem.size(1);
  if (!tex.has_value()) return sem.size(0) == batch && rest == 0;
  return is_kernel_dtype(*tex) && sem.size(0) == batch && has_shape(*tex, {batch, rest}) && rest > 0;
}

static ConditionArgs arguments(const Tensor& sem, const OptionalTensor& tex, const Tensor& label) {
  ConditionArgs args{};
  args.sem_dtype = dtype_of(sem), args.label_dtype = dtype_of(label);
  args.tex_dtype = tex.has_value() ? dtype_of(*tex) : Dtype::f32;
  args.sem = pointer(sem), args.label = pointer(label), args.tex = tex.has_value() ? pointer(*tex) : nullptr;
  args.half = sem.size(1), args.width = label.size(1);
  return args;
}

static ScalarType output_dtype(const Tensor& sem, const OptionalTensor& tex, const Tensor& label) {
  const ScalarType both = promoted(sem.scalar_type(), tex.has_value() ? tex->scalar_type() : sem.scalar_type());
  return promoted(both, label.scalar_type());
}

static Tensor condition_silu(Tensor e_sem, OptionalTensor e_tex, Tensor e_label) {
  if (!is_supported(e_sem, e_tex, e_label)) return reference<Tensor>("condition_silu", e_sem, e_tex, e_label);
  e_sem = dense(e_sem), e_label = dense(e_label);
  if (e_tex.has_value()) e_tex = dense(*e_tex);
  const Tensor out = fresh({e_label.size(0), e_label.size(1)}, output_dtype(e_sem, e_tex, e_label));
  ConditionArgs args = arguments(e_sem, e_tex, e_label);
  args.out_dtype = dtype_of(out), args.out = output(out);
  run(condition_silu_rows, args, e_label.size(0), grain(2 * args.width));
  return out;
}

static std::tuple<Tensor, Tensor, Tensor> condition_silu_backward(Tensor dy, Tensor e_sem, OptionalTensor e_tex,
                                                                  Tensor e_label) {
  if (!is_supported(e_sem, e_tex, e_label) || !same_shape(dy, e_label) || !is_kernel_dtype(dy))
    return reference<std::tuple<Tensor, Tensor, Tensor>>("condition_silu_backward", dy, e_sem, e_tex, e_label);
  dy = dense(dy), e_sem = dense(e_sem), e_label = dense(e_label);
  if (e_tex.has_value()) e_tex = dense(*e_tex);
  const Tensor dsem = fresh_like(e_sem), dlabel = fresh_like(e_label);
  const Tensor dtex = e_tex.has_value() ? fresh_like(*e_tex) : fresh({0}, e_sem.scalar_type());
  ConditionArgs args = arguments(e_sem, e_tex, e_label);
  args.dy = pointer(dy), args.out_dtype = dtype_of(dy);
  args.dsem = output(dsem), args.dtex = output(dtex), args.dlabel = output(dlabel);
  run(condition_silu_backward_rows, args, e_label.size(0), grain(3 * args.width));
  return {dsem, dtex, dlabel};
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) {
  m.impl("condition_silu", TORCH_BOX(&sfd::condition_silu));
  m.impl("condition_silu_backward", TORCH_BOX(&sfd::condition_silu_backward));
}
#endif
