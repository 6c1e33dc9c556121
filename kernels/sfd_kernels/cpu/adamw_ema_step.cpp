// AdamW, the moving average of the weights and their low-precision copy, in one pass over all parameters.
#include "kernel.h"

namespace sfd {
struct AdamChunk {         // a piece of one parameter
  float *p, *ema;  // ema may be null
  void *m, *s;
  const void* grad;
  void* copy;  // may be null
  i64 n;
};

struct AdamArgs {
  const AdamChunk* chunks;
  Dtype grad_dtype, moment_dtype, copy_dtype;
  // p = p * keep - rate * m / (sqrt(s) * root + eps)
  // rest1 = 1 - beta1 and rest2 = 1 - beta2, taken in double: in float 1 - 0.999 keeps only 14 bits
  float grad_scale, beta1, beta2, rest1, rest2, keep, rate, root, eps, ema_decay;
};

inline constexpr i64 kChunk = 1 << 15;
}  // namespace sfd

SFD_KERNEL(adamw_chunks, AdamArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// The moments that the weights are updated with are those before they are rounded to their own dtype.
template <bool Ema, bool Copy, class Grad, class Moment, class Low>
static void step(const AdamArgs& a, const AdamChunk& c) {
  const Grad* grad = static_cast<const Grad*>(c.grad);
  Moment *first = static_cast<Moment*>(c.m), *second = static_cast<Moment*>(c.s);
  Low* copy = static_cast<Low*>(c.copy);
  const float rest = 1.0f - a.ema_decay;
  constexpr i64 ahead = 256;
  sweep(c.n, [&](i64 i, auto lanes) {
    prefetch(grad + i + ahead);
    prefetch(c.p + i + ahead);
    prefetch(first + i + ahead);
    prefetch(second + i + ahead);
    const vf g = load(grad + i, lanes) * a.grad_scale;
    const vf m = a.beta1 * load(first + i, lanes) + a.rest1 * g;
    const vf s = a.beta2 * load(second + i, lanes) + a.rest2 * g * g;
    const vf p = load(c.p + i, lanes) * a.keep - a.rate * m / (sqrt(s) * a.root + a.eps);
    store(first + i, m, lanes);
    store(second + i, s, lanes);
    store(c.p + i, p, lanes);
    if constexpr (Ema) {
      prefetch(c.ema + i + ahead);
      store(c.ema + i, a.ema_decay * load(c.ema + i, lanes) + rest * p, lanes);
    }
    if constexpr (Copy) store(copy + i, p, lanes);
  });
}

template <bool Ema, class Grad, class Moment>
static void step(const AdamArgs& a, const AdamChunk& c) {
  if (c.copy == nullptr) {
    step<Ema, false, Grad, Moment, float>(a, c);
  } else {
    with_type(a.copy_dtype, [&]<class Low>(Low*) { step<Ema, true, Grad, Moment, Low>(a, c); });
  }
}

void adamw_chunks(const AdamArgs& a, i64 begin, i64 end) {
  for (i64 index = begin; index < end; ++index) {
    const AdamChunk& chunk = a.chunks[index];
    with_type(a.grad_dtype, [&]<class Grad>(Grad*) {
      with_bool(chunk.ema != nullptr, [&]<bool Ema>(Bool<Ema>) {
        if (a.moment_dtype == Dtype::bf16) {
          step<Ema, Grad, BF16>(a, chunk);
        } else {
          step<Ema, Grad, float>(a, chunk);
        }
      });
    });
  }
}

}  // namespace sfd::SFD_ISA
#else

#include <cmath>

namespace sfd {

using Tensors = std::vector<Tensor>;

// Contiguous, of the dtype of the first, as many and as large as the parameters.
static bool matches(const Tensors& tensors, const Tensors& params) {
  if (tensors.size() != params.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (!tensors[i].is_contiguous() || !same_dtype(tensors[i], tensors[0]) || !same_shape(tensors[i], params[i]))
      return false;
  return tensors.empty() || is_kernel_dtype(tensors[0]);
}

static bool is_moment_list(const Tensors& tensors) {
  return tensors.empty() || is_float(tensors[0]) || tensors[0].scalar_type() == ScalarType::BFloat16;
}
static bool is_float_list(const Tensors& tensors) { return tensors.empty() || is_float(tensors[0]); }

static void adamw_ema_step(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas,
                           Tensors copies, Tensor lr, Tensor ema_decay, Tensor step, Tensor grad_scale, Tensor skip,
                           double beta1, double beta2, double eps, double weight_decay) {
  bool supported = matches(params, params) && is_float_list(params) && matches(grads, params) &&
                   matches(exp_avgs, params) && is_moment_list(exp_avgs) && matches(exp_avg_sqs, params) &&
                   (params.empty() || same_dtype(exp_avgs[0], exp_avg_sqs[0])) && (emas.empty() || (matches(emas, params) && is_float_list(emas))) &&
                   (copies.empty() || matches(copies, params));
  for (const Tensor* scalar : {&lr, &ema_decay, &step, &grad_scale, &skip})
    supported = supported && is_float(*scalar) && scalar->numel() == 1;
  if (!supported)
    return reference<void>("adamw_ema_step", params, grads, exp_avgs, exp_avg_sqs, emas, copies, lr, ema_decay, step,
                           grad_scale, skip, beta1, beta2, eps, weight_decay);
  const auto value = [](const Tensor& t) { return static_cast<double>(*pointer<float>(t)); };
  if (params.empty() || value(skip) != 0) return;

  std::vector<AdamChunk> chunks;
  const Dtype grad_dtype = dtype_of(grads[0]), moment_dtype = dtype_of(exp_avgs[0]);
  const Dtype copy_dtype = copies.empty() ? Dtype::f32 : dtype_of(copies[0]);
  const i64 grad_size = static_cast<i64>(grads[0].element_size());
  const i64 moment_size = static_cast<i64>(exp_avgs[0].element_size());
  const i64 copy_size = copies.empty() ? 0 : static_cast<i64>(copies[0].element_size());
  for (size_t i = 0; i < params.size(); ++i) {
    float* p = output<float>(params[i]);
    char *m = output<char>(exp_avgs[i]), *s = output<char>(exp_avg_sqs[i]);
    float* ema = emas.empty() ? nullptr : output<float>(emas[i]);
    const char* grad = pointer<char>(grads[i]);
    char* copy = copies.empty() ? nullptr : output<char>(copies[i]);
    const i64 total = params[i].numel();
    for (i64 first = 0; first < total; first += kChunk)
      chunks.push_back({p + first, ema ? ema + first : nullptr, m + first * moment_size, s + first * moment_size,
                        grad + first * grad_size, copy ? copy + first * copy_size : nullptr,
                        std::min(kChunk, total - first)});
  }
  AdamArgs args{};
  args.chunks = chunks.data();
  args.grad_dtype = grad_dtype, args.moment_dtype = moment_dtype, args.copy_dtype = copy_dtype;
  args.grad_scale = *pointer<float>(grad_scale);
  args.beta1 = static_cast<float>(beta1), args.beta2 = static_cast<float>(beta2), args.eps = static_cast<float>(eps);
  args.rest1 = static_cast<float>(1 - beta1), args.rest2 = static_cast<float>(1 - beta2);
  args.keep = static_cast<float>(1 - value(lr) * weight_decay);
  args.rate = static_cast<float>(value(lr) / (1 - std::pow(beta1, value(step))));
  args.root = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, value(step))));
  args.ema_decay = *pointer<float>(ema_decay);
  run(adamw_chunks, args, static_cast<i64>(chunks.size()), 2);
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) { m.impl("adamw_ema_step", TORCH_BOX(&sfd::adamw_ema_step)); }
#endif
