// SiLU(cat[e_sem, e_tex] + e_label), forward and backward: small, worth a kernel for the calls that it saves.
#include "elementary.h"
#include "kernel.h"

namespace sfd {
struct ConditionArgs {
  Dtype wide, narrow;             // of label, its gradient, y and dy; of sem, tex and their gradients
  const void *sem, *tex, *label;  // (B, half), (B, width - half) or null, (B, width)
  const void* dy;
  void *y, *dsem, *dtex, *dlabel;
  i64 half, width;  // half == width with one clock
};
}  // namespace sfd

SFD_KERNEL(condition_silu_rows, ConditionArgs)
SFD_KERNEL(condition_silu_backward_rows, ConditionArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// f(offset in a row of `width`, elements, embedding, its gradient) for the row's part of each clock.
template <class Narrow, class F>
SFD_INLINE void for_clocks(const ConditionArgs& a, i64 row, F&& f) {
  const i64 rest = a.width - a.half;
  f(row * a.width, a.half, static_cast<const Narrow*>(a.sem) + row * a.half,
    static_cast<Narrow*>(a.dsem) + row * a.half);
  if (rest > 0)
    f(row * a.width + a.half, rest, static_cast<const Narrow*>(a.tex) + row * rest,
      static_cast<Narrow*>(a.dtex) + row * rest);
}

void condition_silu_rows(const ConditionArgs& a, i64 begin, i64 end) {
  with_mix(a.wide, a.narrow, [&]<class Wide, class Narrow>(Wide*, Narrow*) {
    for (i64 row = begin; row < end; ++row) {
      for_clocks<Narrow>(a, row, [&](i64 offset, i64 n, const Narrow* embedding, Narrow*) {
        const Wide* label = static_cast<const Wide*>(a.label) + offset;
        Wide* y = static_cast<Wide*>(a.y) + offset;
        sweep(n, [&](i64 i, auto lanes) {
          const vf c = load(embedding + i, lanes) + load(label + i, lanes);
          store(y + i, times_sigmoid(c, c), lanes);
        });
      });
    }
  });
}

void condition_silu_backward_rows(const ConditionArgs& a, i64 begin, i64 end) {
  with_mix(a.wide, a.narrow, [&]<class Wide, class Narrow>(Wide*, Narrow*) {
    for (i64 row = begin; row < end; ++row) {
      for_clocks<Narrow>(a, row, [&](i64 offset, i64 n, const Narrow* embedding, Narrow* gradient) {
        const Wide* label = static_cast<const Wide*>(a.label) + offset;
        const Wide* dy = static_cast<const Wide*>(a.dy) + offset;
        Wide* dlabel = static_cast<Wide*>(a.dlabel) + offset;
        sweep(n, [&](i64 i, auto lanes) {
          const vf c = load(embedding + i, lanes) + load(label + i, lanes), s = sigmoid(c);
          const vf dc = load(dy + i, lanes) * s * (1.0f + c * (1.0f - s));
          store(gradient + i, dc, lanes);
          store(dlabel + i, dc, lanes);
        });
      });
    }
  });
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static bool is_supported(const Tensor& sem, const OptionalTensor& tex, const Tensor& label) {
  if (sem.dim() != 2 || label.dim() != 2 || !is_mix(label, sem)) return false;
  const i64 batch = label.size(0), rest = label.size(1) - sem.size(1);
  if (!tex.has_value()) return sem.size(0) == batch && rest == 0;
  return same_dtype(*tex, sem) && sem.size(0) == batch && has_shape(*tex, {batch, rest}) && rest > 0;
}

static ConditionArgs arguments(const Tensor& sem, const OptionalTensor& tex, const Tensor& label) {
  ConditionArgs args{};
  args.wide = dtype_of(label), args.narrow = dtype_of(sem);
  args.sem = pointer(sem), args.label = pointer(label), args.tex = tex.has_value() ? pointer(*tex) : nullptr;
  args.half = sem.size(1), args.width = label.size(1);
  return args;
}

static Tensor condition_silu(Tensor e_sem, OptionalTensor e_tex, Tensor e_label) {
  if (!is_supported(e_sem, e_tex, e_label)) return reference<Tensor>("condition_silu", e_sem, e_tex, e_label);
  e_sem = dense(e_sem), e_label = dense(e_label);
  if (e_tex.has_value()) e_tex = dense(*e_tex);
  const Tensor y = fresh_like(e_label);
  ConditionArgs args = arguments(e_sem, e_tex, e_label);
  args.y = output(y);
  run(condition_silu_rows, args, e_label.size(0), grain(2 * args.width));
  return y;
}

static std::tuple<Tensor, Tensor, Tensor> condition_silu_backward(Tensor dy, Tensor e_sem, OptionalTensor e_tex,
                                                                  Tensor e_label) {
  if (!is_supported(e_sem, e_tex, e_label) || !same_shape(dy, e_label) || !same_dtype(dy, e_label))
    return reference<std::tuple<Tensor, Tensor, Tensor> >("condition_silu_backward", dy, e_sem, e_tex, e_label);
  dy = dense(dy), e_sem = dense(e_sem), e_label = dense(e_label);
  if (e_tex.has_value()) e_tex = dense(*e_tex);
  const Tensor dsem = fresh_like(e_sem), dlabel = fresh_like(e_label);
  const Tensor dtex = e_tex.has_value() ? fresh_like(*e_tex) : fresh({0}, e_sem.scalar_type());
  ConditionArgs args = arguments(e_sem, e_tex, e_label);
  args.dy = pointer(dy), args.dsem = output(dsem), args.dtex = output(dtex), args.dlabel = output(dlabel);
  run(condition_silu_backward_rows, args, e_label.size(0), grain(3 * args.width));
  return {dsem, dtex, dlabel};
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) {
  m.impl("condition_silu", TORCH_BOX(&sfd::condition_silu));
  m.impl("condition_silu_backward", TORCH_BOX(&sfd::condition_silu_backward));
}
#endif
