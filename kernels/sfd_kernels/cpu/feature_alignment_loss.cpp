// Per sample: mse = mean (p - t)^2, cosine = mean over tokens of 1 - cos(p, t) along features, forward and backward.
#include "kernel.h"

namespace sfd {
struct FeatureArgs {
  Dtype pred_dtype, target_dtype;
  const void *pred, *target;   // (B, N, F)
  const float *d_mse, *d_cos;  // backward: (B,)
  void* dpred;
  float *errors, *cosines;  // forward: sums of a task
  i64 tokens, width, tasks_per_sample;
  bool stream;
};

inline constexpr i64 kTokensPerFeatureTask = 32;
}  // namespace sfd

SFD_KERNEL(feature_loss_tasks, FeatureArgs)
SFD_KERNEL(feature_loss_backward_tasks, FeatureArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

inline constexpr float kEpsSquared = 1e-16f;  // a shorter vector has cosine 0 and no gradient

struct RowSums {
  float pp, tt, pt, error;
};

template <class P, class T>
SFD_INLINE RowSums row_sums(const P* p, const T* t, i64 n) {
  vf pp[2] = {}, tt[2] = {}, pt[2] = {}, error[2] = {};
  sweep<2>(n, [&](i64 i, auto lanes, int k) {
    const vf x = load(p + i, lanes), y = load(t + i, lanes), e = x - y;
    pp[k] += x * x;
    tt[k] += y * y;
    pt[k] += x * y;
    error[k] += e * e;
  });
  return {sum(pp), sum(tt), sum(pt), sum(error)};
}

SFD_INLINE float inverse_norm(float squared) { return squared > kEpsSquared ? 1.0f / __builtin_sqrtf(squared) : 0.0f; }

template <class P, class T>
static void forward(const FeatureArgs& a, i64 begin, i64 end) {
  for (i64 task = begin; task < end; ++task) {
    const i64 sample = task / a.tasks_per_sample, first = task % a.tasks_per_sample * kTokensPerFeatureTask;
    const i64 last = first + kTokensPerFeatureTask < a.tokens ? first + kTokensPerFeatureTask : a.tokens;
    float errors = 0, cosines = 0;
    for (i64 row = sample * a.tokens + first; row < sample * a.tokens + last; ++row) {
      const P* p = static_cast<const P*>(a.pred) + row * a.width;
      const T* t = static_cast<const T*>(a.target) + row * a.width;
      const RowSums s = row_sums(p, t, a.width);
      errors += s.error;
      cosines += 1.0f - s.pt * inverse_norm(s.pp) * inverse_norm(s.tt);
    }
    a.errors[task] = errors;
    a.cosines[task] = cosines;
  }
}

// dpred = 2 d_mse (p - t) / (N F) - d_cos (t / (|p| |t|) - cos p / |p|^2) / N.
template <bool Stream, class P, class T>
static void backward(const FeatureArgs& a, i64 begin, i64 end) {
  for (i64 task = begin; task < end; ++task) {
    const i64 sample = task / a.tasks_per_sample, first = task % a.tasks_per_sample * kTokensPerFeatureTask;
    const i64 last = first + kTokensPerFeatureTask < a.tokens ? first + kTokensPerFeatureTask : a.tokens;
    const float d_mse = 2.0f * a.d_mse[sample] / static_cast<float>(a.tokens * a.width);
    const float d_cos = a.d_cos[sample] / static_cast<float>(a.tokens);
    for (i64 row = sample * a.tokens + first; row < sample * a.tokens + last; ++row) {
      const P* p = static_cast<const P*>(a.pred) + row * a.width;
      const T* t = static_cast<const T*>(a.target) + row * a.width;
      P* out = static_cast<P*>(a.dpred) + row * a.width;
      const RowSums s = row_sums(p, t, a.width);
      const float ip = inverse_norm(s.pp), it = inverse_norm(s.tt);
      const float of_p = d_cos * (s.pt * ip * it) * ip * ip, of_t = -d_cos * ip * it;
      sweep(a.width, [&](i64 i, auto lanes) {
        const vf x = load(p + i, lanes), y = load(t + i, lanes);
        put<Stream>(out + i, d_mse * (x - y) + (of_p * x + of_t * y), lanes);
      });
    }
  }
}

template <class F>
SFD_INLINE void with_types(const FeatureArgs& a, F&& f) {
  with_type(a.pred_dtype, [&](auto* p) { with_type(a.target_dtype, [&](auto* t) { f(p, t); }); });
}

void feature_loss_tasks(const FeatureArgs& a, i64 begin, i64 end) {
  with_types(a, [&]<class P, class T>(P*, T*) { forward<P, T>(a, begin, end); });
}

void feature_loss_backward_tasks(const FeatureArgs& a, i64 begin, i64 end) {
  with_types(a, [&]<class P, class T>(P*, T*) {
    with_bool(a.stream, [&]<bool Stream>(Bool<Stream>) { backward<Stream, P, T>(a, begin, end); });
  });
  fence();
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static bool is_supported(const Tensor& pred, const Tensor& target) {
  return pred.dim() == 3 && is_kernel_dtype(pred) && is_kernel_dtype(target) && same_shape(pred, target) &&
         pred.size(1) > 0 && pred.size(2) > 0;
}

static FeatureArgs arguments(const Tensor& pred, const Tensor& target) {
  FeatureArgs args{};
  args.pred_dtype = dtype_of(pred), args.target_dtype = dtype_of(target);
  args.pred = pointer(pred), args.target = pointer(target);
  args.tokens = pred.size(1), args.width = pred.size(2);
  args.tasks_per_sample = ceil_div(args.tokens, kTokensPerFeatureTask);
  return args;
}

static std::tuple<Tensor, Tensor> feature_alignment_loss(Tensor pred, Tensor target) {
  if (!is_supported(pred, target))
    return reference<std::tuple<Tensor, Tensor> >("feature_alignment_loss", pred, target);
  pred = dense(pred), target = dense(target);
  FeatureArgs args = arguments(pred, target);
  const i64 batch = pred.size(0), tasks = batch * args.tasks_per_sample;
  std::vector<float> sums(2 * tasks);
  args.errors = sums.data(), args.cosines = sums.data() + tasks;
  run(feature_loss_tasks, args, tasks, grain(2 * kTokensPerFeatureTask * args.width));
  return {sample_means(args.errors, batch, args.tasks_per_sample, args.tokens * args.width),
          sample_means(args.cosines, batch, args.tasks_per_sample, args.tokens)};
}

static Tensor feature_alignment_loss_backward(Tensor d_mse, Tensor d_cos, Tensor pred, Tensor target) {
  if (!is_supported(pred, target) || !is_float(d_mse) || !is_float(d_cos) || !has_shape(d_mse, {pred.size(0)}) ||
      !has_shape(d_cos, {pred.size(0)}))
    return reference<Tensor>("feature_alignment_loss_backward", d_mse, d_cos, pred, target);
  pred = dense(pred), target = dense(target), d_mse = dense(d_mse), d_cos = dense(d_cos);
  const Tensor dpred = fresh_like(pred);
  FeatureArgs args = arguments(pred, target);
  args.d_mse = pointer<float>(d_mse), args.d_cos = pointer<float>(d_cos);
  args.dpred = output(dpred);
  args.stream = should_stream(dpred, args.width);
  run(feature_loss_backward_tasks, args, pred.size(0) * args.tasks_per_sample,
      grain(3 * kTokensPerFeatureTask * args.width));
  return dpred;
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) {
  m.impl("feature_alignment_loss", TORCH_BOX(&sfd::feature_alignment_loss));
  m.impl("feature_alignment_loss_backward", TORCH_BOX(&sfd::feature_alignment_loss_backward));
}
#endif
