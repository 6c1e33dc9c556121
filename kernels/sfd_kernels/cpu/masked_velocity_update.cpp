// One stage of the two-stream solver, in place: guidance, mask and update of
//   x = (base or x) + c_0 g + sum_k c_{1+k} history_k,  history_slot = g,  base = x.
#include "kernel.h"

namespace sfd {
inline constexpr i64 kMaxHistory = 16;

struct UpdateArgs {
  Dtype dtype;                                          // of v and v_guide
  float *x, *base, *history;                            // base and history may be null
  const void *v, *v_guide;                              // v_guide may be null
  float guidance[2], coefficients[2][1 + kMaxHistory];  // per stream: texture, semantic
  i64 num_history, write_slot;
  i64 batch, size, texture_size;  // elements of a sample, and of its texture channels
  bool commit;
};
}  // namespace sfd

SFD_KERNEL(velocity_update_samples, UpdateArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// Elements of one stream of one sample. Terms whose coefficient is 0 are not even read: that is the mask, also of a
// NaN.
template <bool Guided, class T>
static void update(const UpdateArgs& a, i64 offset, i64 n, int stream) {
  const T* v = static_cast<const T*>(a.v) + offset;
  const T* v_guide = Guided ? static_cast<const T*>(a.v_guide) + offset : nullptr;
  float* x = a.x + offset;
  float* base = a.base ? a.base + offset : nullptr;
  const float* from = base ? base : x;
  float* slot = a.write_slot >= 0 ? a.history + a.write_slot * a.batch * a.size + offset : nullptr;
  const float guidance = a.guidance[stream], step = a.coefficients[stream][0];
  const float* terms[kMaxHistory];
  float factors[kMaxHistory];
  int count = 0;
  for (i64 k = 0; k < a.num_history; ++k) {
    if (a.coefficients[stream][1 + k] == 0) continue;
    terms[count] = a.history + k * a.batch * a.size + offset;
    factors[count++] = a.coefficients[stream][1 + k];
  }
  const bool moves = step != 0, reads_velocity = moves || slot;
  constexpr i64 ahead = 1024;
  sweep(n, [&](i64 i, auto lanes) {
    prefetch(from + i + ahead);
    vf sum = load(from + i, lanes), g = {};
    if (reads_velocity) {
      prefetch(v + i + ahead);
      g = load(v + i, lanes);
      if constexpr (Guided) {
        prefetch(v_guide + i + ahead);
        const vf w = load(v_guide + i, lanes);
        g = w + guidance * (g - w);
      }
    }
    if (moves) sum += step * g;
    for (int k = 0; k < count; ++k) {
      prefetch(terms[k] + i + ahead);
      sum += factors[k] * load(terms[k] + i, lanes);
    }
    if (slot) store(slot + i, g, lanes);
    store(x + i, sum, lanes);
    if (a.commit) store(base + i, sum, lanes);
  });
}

void velocity_update_samples(const UpdateArgs& a, i64 begin, i64 end) {
  with_type(a.dtype, [&]<class T>(T*) {
    for (i64 sample = begin; sample < end; ++sample)
      for (int stream = 0; stream < 2; ++stream) {
        const i64 offset = sample * a.size + (stream ? a.texture_size : 0);
        const i64 n = stream ? a.size - a.texture_size : a.texture_size;
        // A stream of weight 1 keeps v's own bits: its guide is not even read.
        with_bool(a.v_guide != nullptr && a.guidance[stream] != 1,
                  [&]<bool Guided>(Bool<Guided>) { update<Guided, T>(a, offset, n, stream); });
      }
  });
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static bool is_state(const OptionalTensor& t, const Tensor& x) {
  return !t.has_value() || (is_float(*t) && t->is_contiguous() && same_shape(*t, x));
}

static bool is_integer(const OptionalTensor& t) {
  return !t.has_value() || (t->scalar_type() == ScalarType::Long && t->numel() == 1);
}

static void masked_velocity_update(Tensor x, OptionalTensor base, OptionalTensor history, Tensor v,
                                   OptionalTensor v_guide, OptionalTensor guidance, Tensor coefficients,
                                   OptionalTensor write_slot, OptionalTensor commit, i64 num_texture_channels) {
  bool supported = x.dim() == 4 && is_state(x, x) && is_state(base, x) && is_kernel_dtype(v) && same_shape(v, x) &&
                   is_float(coefficients) && coefficients.dim() == 2 && coefficients.size(0) == 2 &&
                   is_integer(write_slot) && is_integer(commit) && v_guide.has_value() == guidance.has_value();
  if (supported && v_guide.has_value())
    supported = same_shape(*v_guide, x) && same_dtype(*v_guide, v) && is_float(*guidance) && has_shape(*guidance, {2});
  i64 num_history = 0;
  if (supported && history.has_value()) {
    num_history = history->dim() == 5 ? history->size(0) : -1;
    supported = num_history >= 0 && num_history <= kMaxHistory && is_float(*history) && history->is_contiguous() &&
                has_shape(*history, {num_history, x.size(0), x.size(1), x.size(2), x.size(3)});
  }
  UpdateArgs args{};
  args.write_slot = supported && history.has_value() && write_slot.has_value() ? *pointer<i64>(*write_slot) : -1;
  if (!supported || coefficients.size(1) != 1 + num_history || args.write_slot >= num_history)
    return reference<void>("masked_velocity_update", x, base, history, v, v_guide, guidance, coefficients, write_slot,
                           commit, num_texture_channels);
  v = dense(v);
  args.dtype = dtype_of(v);
  args.x = output<float>(x), args.base = base.has_value() ? output<float>(*base) : nullptr;
  args.history = history.has_value() ? output<float>(*history) : nullptr;
  args.v = pointer(v);
  if (v_guide.has_value()) {
    v_guide = dense(*v_guide);
    args.v_guide = pointer(*v_guide);
    for (i64 s = 0; s < 2; ++s) args.guidance[s] = pointer<float>(*guidance)[s * guidance->stride(0)];
  }
  for (i64 s = 0; s < 2; ++s)
    for (i64 k = 0; k <= num_history; ++k)
      args.coefficients[s][k] = pointer<float>(coefficients)[s * coefficients.stride(0) + k * coefficients.stride(1)];
  const i64 plane = x.size(2) * x.size(3), channels = x.size(1);
  args.num_history = num_history;
  args.batch = x.size(0), args.size = channels * plane;
  args.texture_size = std::clamp<i64>(num_texture_channels, 0, channels) * plane;
  args.commit = base.has_value() && commit.has_value() && *pointer<i64>(*commit) != 0;
  run(velocity_update_samples, args, args.batch, grain((4 + num_history) * args.size));
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) { m.impl("masked_velocity_update", TORCH_BOX(&sfd::masked_velocity_update)); }
#endif
