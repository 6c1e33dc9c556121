// Queries and keys from packed qkv: RMSNorm per head and rotation of interleaved pairs, forward and backward.
//
// With w the weight, c and s the tables and j' = j ^ 1 the other entry of a pair, a head turns into
//   q_j = rstd (x_j w_j c_j -+ x_j' w_j' s_j)     (- for even j)
// so the products with w are taken once a token, for all of its heads; neighbours change places by one permutation.
#include "heads.h"

namespace sfd {
struct QkArgs {
  Dtype dtype;
  const void* qkv;              // (B, N, 3, H, d)
  const float* weight[2];       // (d,), or null: no normalisation
  const float *cos, *sin;       // (N, d), or null: no rotation
  void* out[2];                 // forward: q, k
  HeadRows grad[3];             // backward: dq, dk, dv (or null)
  void* dqkv;                   // backward
  float* weight_partial;        // backward: (tasks, 2, d)
  i64 tokens, total, heads, d;  // total = B N
  float eps;
  bool stream;
};

struct QkReduceArgs {
  const float* partial;  // (tasks, 2, d)
  i64 tasks, d;
  float* dweight[2];
};

inline constexpr i64 kTokensPerTask = 16;
inline constexpr i64 kMaxHeadDim = 1024;
}  // namespace sfd

SFD_KERNEL(qk_norm_rope_tasks, QkArgs)
SFD_KERNEL(qk_norm_rope_backward_tasks, QkArgs)
SFD_KERNEL(qk_weight_reduce, QkReduceArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// A row computed in the cache goes out with aligned streaming stores: a head of 72 starts in the middle of a line.
SFD_INLINE void stream_row(void* to, const void* from, i64 bytes) {
  for (i64 i = 0; i < bytes; i += static_cast<i64>(sizeof(vf)))
    stream(reinterpret_cast<float*>(static_cast<char*>(to) + i), load_raw<vf>(static_cast<const char*>(from) + i));
}

// D is the head's size where the compiler shall know it (a head then stays in registers), else 0.
template <int D, bool Rope, bool Stream, class T>
static void forward(const QkArgs& a, i64 begin, i64 end) {
  const i64 d = D > 0 ? D : a.d, row = a.heads * d;
  SFD_SCRATCH(straight, d);  // w_j c_j
  SFD_SCRATCH(crossed, d);   // -+ w_j' s_j
  SFD_SCRATCH(buffer, Stream ? row : 0);
  const i64 last = end * kTokensPerTask < a.total ? end * kTokensPerTask : a.total;
  for (i64 token = begin * kTokensPerTask; token < last; ++token) {
    const T* qkv = static_cast<const T*>(a.qkv) + token * 3 * row;
    const i64 table = token % a.tokens * d;
    for (int part = 0; part < 2; ++part) {
      const float* weight = a.weight[part];
      sweep(d, [&](i64 j, auto lanes) {
        const vf w = weight ? load(weight + j, lanes) : splat(1.0f);
        store(straight + j, Rope ? w * load(a.cos + table + j, lanes) : w, lanes);
        if constexpr (Rope) store(crossed + j, swap_pairs(w) * -alternate(load(a.sin + table + j, lanes)), lanes);
      });
      T* out = static_cast<T*>(a.out[part]) + token * row;
      for (i64 head = 0; head < a.heads; ++head) {
        const T* x = qkv + part * row + head * d;
        T* to = (Stream ? reinterpret_cast<T*>(buffer) : out) + head * d;
        float rstd = 1.0f;
        if (weight) {
          vf squares = {};
          sweep(d, [&](i64 i, auto lanes) {
            prefetch(x + 3 * row + i);
            const vf v = load(x + i, lanes);
            squares += v * v;
          });
          rstd = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(d) + a.eps);
        }
        sweep(d, [&](i64 i, auto lanes) {
          const vf v = load(x + i, lanes);
          vf y = v * load(straight + i, lanes);
          if constexpr (Rope) y += swap_pairs(v) * load(crossed + i, lanes);
          store(to + i, y * rstd, lanes);
        });
      }
      if constexpr (Stream) stream_row(out, buffer, row * static_cast<i64>(sizeof(T)));
    }
  }
}

template <int D, bool Rope, bool Stream, class T>
static void backward(const QkArgs& a, i64 begin, i64 end) {
  const i64 d = D > 0 ? D : a.d, row = a.heads * d;
  SFD_SCRATCH(crossed, d);  // +- s_j', the transpose of the rotation
  SFD_SCRATCH(of_token, d);
  SFD_SCRATCH(buffer, Stream ? 3 * row : 0);
  for (i64 task = begin; task < end; ++task) {
    float* of_task = a.weight_partial + task * 2 * d;
    fill(of_task, 0.0f, 2 * d);
    const i64 last = (task + 1) * kTokensPerTask < a.total ? (task + 1) * kTokensPerTask : a.total;
    for (i64 token = task * kTokensPerTask; token < last; ++token) {
      const T* qkv = static_cast<const T*>(a.qkv) + token * 3 * row;
      T* dqkv = static_cast<T*>(a.dqkv) + token * 3 * row;
      T* to_row = Stream ? reinterpret_cast<T*>(buffer) : dqkv;
      const i64 sample = token / a.tokens, position = token % a.tokens;
      const float* straight = Rope ? a.cos + position * d : nullptr;
      if constexpr (Rope) {
        const float* sin = a.sin + position * d;
        sweep(d, [&](i64 j, auto lanes) { store(crossed + j, alternate(swap_pairs(load(sin + j, lanes))), lanes); });
      }
      for (int part = 0; part < 3; ++part) {
        const HeadRows& rows = a.grad[part];
        const T* grads = static_cast<const T*>(rows.data) + sample * rows.batch + position * rows.token;
        if (part == 2) {
          for (i64 head = 0; head < a.heads; ++head) {
            T* to = to_row + 2 * row + head * d;
            const T* g = grads + head * rows.head;
            if (rows.data == nullptr) {
              __builtin_memset(to, 0, d * sizeof(T));
            } else {
              sweep(d, [&](i64 i, auto) { prefetch(g + rows.token + i); });
              __builtin_memcpy(to, g, d * sizeof(T));
            }
          }
          continue;
        }
        const float* weight = a.weight[part];
        if (weight) fill(of_token, 0.0f, d);
        for (i64 head = 0; head < a.heads; ++head) {
          const T* x = qkv + part * row + head * d;
          const T* g = grads + head * rows.head;
          T* to = to_row + part * row + head * d;
          const auto unrotated = [&](i64 i, auto lanes) {
            const vf v = load(g + i, lanes);
            if constexpr (!Rope) return v;
            return v * load(straight + i, lanes) + swap_pairs(v) * load(crossed + i, lanes);
          };
          if (weight == nullptr) {
            sweep(d, [&](i64 i, auto lanes) { store(to + i, unrotated(i, lanes), lanes); });
            continue;
          }
          vf squares = {}, inner = {};
          sweep(d, [&](i64 i, auto lanes) {
            prefetch(x + 3 * row + i);
            prefetch(g + rows.token + i);
            const vf v = load(x + i, lanes);
            squares += v * v;
            inner += unrotated(i, lanes) * load(weight + i, lanes) * v;
          });
          const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(d) + a.eps);
          const float mean = sum(inner) * rstd / static_cast<float>(d);
          sweep(d, [&](i64 i, auto lanes) {
            const vf x_hat = load(x + i, lanes) * rstd, grad = unrotated(i, lanes);
            store(of_token + i, load(of_token + i, lanes) + grad * x_hat, lanes);
            store(to + i, rstd * (grad * load(weight + i, lanes) - x_hat * mean), lanes);
          });
        }
        if (weight)
          sweep(d, [&](i64 i, auto lanes) {
            float* total = of_task + part * d + i;
            store(total, load(total, lanes) + load(of_token + i, lanes), lanes);
          });
      }
      if constexpr (Stream) stream_row(dqkv, buffer, 3 * row * static_cast<i64>(sizeof(T)));
    }
  }
}

// f(size tag, rope tag, stream tag, type): head sizes of the released models are compiled in.
template <class F>
SFD_INLINE void with_variant(const QkArgs& a, F&& f) {
  with_type(a.dtype, [&]<class T>(T* type) {
    with_bool(a.cos != nullptr, [&](auto rope) {
      with_bool(a.stream, [&](auto stream) {
        switch (a.d) {
          case 64:
            return f.template operator()<64>(rope, stream, type);
          case 72:
            return f.template operator()<72>(rope, stream, type);
          default:
            return f.template operator()<0>(rope, stream, type);
        }
      });
    });
  });
}

void qk_norm_rope_tasks(const QkArgs& a, i64 begin, i64 end) {
  with_variant(a, [&]<int D, bool Rope, bool Stream, class T>(Bool<Rope>, Bool<Stream>, T*) {
    forward<D, Rope, Stream, T>(a, begin, end);
  });
  fence();
}

void qk_norm_rope_backward_tasks(const QkArgs& a, i64 begin, i64 end) {
  with_variant(a, [&]<int D, bool Rope, bool Stream, class T>(Bool<Rope>, Bool<Stream>, T*) {
    backward<D, Rope, Stream, T>(a, begin, end);
  });
  fence();
}

// One task for each of q and k.
void qk_weight_reduce(const QkReduceArgs& a, i64 begin, i64 end) {
  for (i64 part = begin; part < end; ++part) {
    if (a.dweight[part] == nullptr) continue;
    for (i64 j = 0; j < a.d; ++j) {
      double total = 0;
      for (i64 task = 0; task < a.tasks; ++task) total += a.partial[(task * 2 + part) * a.d + j];
      a.dweight[part][j] = static_cast<float>(total);
    }
  }
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static bool is_supported(const Tensor& qkv, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                         const OptionalTensor& cos, const OptionalTensor& sin) {
  if (qkv.dim() != 5 || qkv.size(2) != 3 || !is_kernel_dtype(qkv) || qkv.size(4) > kMaxHeadDim ||
      qkv.size(3) * qkv.size(4) > kMaxWidth || cos.has_value() != sin.has_value())
    return false;
  const i64 tokens = qkv.size(1), d = qkv.size(4);
  for (const auto* weight : {&q_weight, &k_weight})
    if (weight->has_value() && (!has_shape(**weight, {d}) || !is_kernel_dtype(**weight))) return false;
  for (const auto* table : {&cos, &sin})
    if (table->has_value() && (!has_shape(**table, {tokens, d}) || !is_float(**table) || d % 2 != 0)) return false;
  return true;
}

// Contiguous floats: weights and tables are small.
static OptionalTensor floats(const OptionalTensor& t) {
  if (!t.has_value()) return t;
  return dense(is_float(*t) ? *t : torch::stable::to(*t, ScalarType::Float));
}

static QkArgs arguments(const Tensor& qkv, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                        const OptionalTensor& cos, const OptionalTensor& sin, double eps) {
  QkArgs args{};
  args.dtype = dtype_of(qkv);
  args.qkv = pointer(qkv);
  args.weight[0] = q_weight.has_value() ? pointer<float>(*q_weight) : nullptr;
  args.weight[1] = k_weight.has_value() ? pointer<float>(*k_weight) : nullptr;
  args.cos = cos.has_value() ? pointer<float>(*cos) : nullptr;
  args.sin = sin.has_value() ? pointer<float>(*sin) : nullptr;
  args.tokens = qkv.size(1), args.total = qkv.size(0) * qkv.size(1), args.heads = qkv.size(3), args.d = qkv.size(4);
  args.eps = static_cast<float>(eps);
  return args;
}

static std::tuple<Tensor, Tensor> qk_norm_rope(Tensor qkv, OptionalTensor q_weight, OptionalTensor k_weight,
                                               OptionalTensor cos, OptionalTensor sin, double eps) {
  if (!is_supported(qkv, q_weight, k_weight, cos, sin))
    return reference<std::tuple<Tensor, Tensor> >("qk_norm_rope", qkv, q_weight, k_weight, cos, sin, eps);
  qkv = dense(qkv), q_weight = floats(q_weight), k_weight = floats(k_weight), cos = floats(cos), sin = floats(sin);
  const std::initializer_list<i64> shape{qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)};
  const Tensor q = fresh(shape, qkv.scalar_type()), k = fresh(shape, qkv.scalar_type());
  QkArgs args = arguments(qkv, q_weight, k_weight, cos, sin, eps);
  args.out[0] = output(q), args.out[1] = output(k);
  const i64 row = args.heads * args.d;
  args.stream = should_stream(q, row) && should_stream(k, row);
  run(qk_norm_rope_tasks, args, ceil_div(args.total, kTokensPerTask), grain(2 * kTokensPerTask * row));
  return {q, k};
}

static std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_backward(Tensor dq, Tensor dk, OptionalTensor dv, Tensor qkv,
                                                                OptionalTensor q_weight, OptionalTensor k_weight,
                                                                OptionalTensor cos, OptionalTensor sin, double eps) {
  bool supported = is_supported(qkv, q_weight, k_weight, cos, sin);
  for (const Tensor* grad : {&dq, &dk, dv.has_value() ? &*dv : &dq})
    supported =
        supported && same_dtype(*grad, qkv) && has_shape(*grad, {qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)});
  for (const auto* weight : {&q_weight, &k_weight})
    supported = supported && (!weight->has_value() || is_float(**weight) || same_dtype(**weight, qkv));
  if (!supported)
    return reference<std::tuple<Tensor, Tensor, Tensor> >("qk_norm_rope_backward", dq, dk, dv, qkv, q_weight, k_weight,
                                                          cos, sin, eps);
  const Tensor dqkv = fresh({qkv.size(0), qkv.size(1), 3, qkv.size(3), qkv.size(4)}, qkv.scalar_type());
  const OptionalTensor weights[2] = {q_weight, k_weight};
  qkv = dense(qkv), q_weight = floats(q_weight), k_weight = floats(k_weight), cos = floats(cos), sin = floats(sin);
  QkArgs args = arguments(qkv, q_weight, k_weight, cos, sin, eps);
  // Attention returns gradients as (B, H, N, d) in memory, seen as (B, N, H, d): read by strides, not copied first.
  args.grad[0] = head_rows(dq), args.grad[1] = head_rows(dk);
  args.grad[2] = dv.has_value() ? head_rows(*dv) : HeadRows{nullptr, 0, 0, 0};
  args.dqkv = output(dqkv);
  const i64 row = args.heads * args.d, tasks = ceil_div(args.total, kTokensPerTask);
  args.stream = should_stream(dqkv, row);
  const Tensor partial = fresh({tasks, 2, args.d}, ScalarType::Float);
  args.weight_partial = output<float>(partial);
  run(qk_norm_rope_backward_tasks, args, tasks, grain(3 * kTokensPerTask * row));

  QkReduceArgs reduce{args.weight_partial, tasks, args.d, {nullptr, nullptr}};
  std::array<Tensor, 2> gradients;
  for (int part = 0; part < 2; ++part) {
    if (!weights[part].has_value()) {
      gradients[part] = fresh({0}, qkv.scalar_type());
    } else {
      gradients[part] = fresh({args.d}, ScalarType::Float);
      reduce.dweight[part] = output<float>(gradients[part]);
    }
  }
  run(qk_weight_reduce, reduce, 2, 2);
  for (int part = 0; part < 2; ++part)
    if (weights[part].has_value() && !is_float(*weights[part]))
      gradients[part] = torch::stable::to(gradients[part], weights[part]->scalar_type());
  return {dqkv, gradients[0], gradients[1]};
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&sfd::qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&sfd::qk_norm_rope_backward));
}
#endif
