// Attention, forward: the softmax over the keys is taken block by block, with the maximum so far (online softmax,
// arXiv 1805.02867). A task is one head of one sample and up to 512 of its queries.
#include "attention.h"

SFD_BF16_KERNEL(attention_tasks, AttentionArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

using E = Matrix::Element;

struct Step {  // queries from `query` on with the keys of a block, padded
  i64 query, queries, keys;
  bool first;  // block of the head
};

// The new maximum of a step's queries, in `top`, and what weights relative to the old one are multiplied with.
static void new_maxima(const ForwardScratch<E>& s, const Step& x, float factor, float* kept) {
  float* top = s.top + x.query;
  for (i64 row = 0; row < x.queries; ++row) {
    vf most[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())};
    for (i64 key = 0; key < x.keys; key += kTile)
      for (int i = 0; i < kTile; i += W) {
        vf& kept_of = most[(key + i) / W % 2];
        kept_of = greater(load(in_tiles(s.scores, row, x.keys, key + i), Full{}), kept_of);
      }
    const float now = greatest(greater(most[0], most[1])) * factor, before = top[row];
    top[row] = x.first || now > before ? now : before;
    kept[row] = before - top[row];
  }
  for (i64 row = 0; row < x.queries; row += W) store(kept + row, exp2(load(kept + row, Full{})), Full{});
}

// weights = 2^(scores factor - top) of a step's queries. `top` is the maximum so far and `total` the sum of the weights
// relative to it; what was summed up before is scaled to the new maximum.
static void softmax_rows(const ForwardScratch<E>& s, const Step& x, i64 width, float factor) {
  alignas(64) float kept[kTokenStep];
  new_maxima(s, x, factor, kept);
  for (i64 row = 0; row < x.queries; ++row) {
    const vf top = splat(s.top[x.query + row]);
    vf sums = {};
    for (i64 key = 0; key < x.keys; key += Matrix::kTokens) {
      vf weights[Matrix::kVectors];
      for (int i = 0; i < Matrix::kVectors; ++i) {
        weights[i] = exp2(load(in_tiles(s.scores, row, x.keys, key + i * W), Full{}) * factor - top);
        sums += weights[i];
      }
      Matrix::put_row(s.weights, x.keys, row, key, Matrix::rounded(weights));
    }
    float& total = s.total[x.query + row];
    total = x.first ? sum(sums) : total * kept[row] + sum(sums);
    if (x.first) continue;
    for (i64 dim = 0; dim < width; dim += W) {
      float* out = in_tiles(s.out + x.query * width, row, width, dim);
      store(out, load(out, Full{}) * kept[row], Full{});
    }
  }
}

// Keys past the last get no weight.
static void hide_padding(const ForwardScratch<E>& s, const Step& x, i64 inside) {
  for (i64 row = 0; row < x.queries; ++row)
    for (i64 key = inside; key < x.keys; ++key) *in_tiles(s.scores, row, x.keys, key) = -__builtin_inff();
}

template <class T>
static void write_task(const AttentionArgs& a, const ForwardScratch<E>& s, i64 sample, i64 head, i64 first, i64 count) {
  const i64 column_tiles = round_up(a.d, kTile) / kTile;
  float* lse = a.lse + (sample * a.heads + head) * a.tokens + first;
  sweep(count, [&](i64 row, auto lanes) {
    const vf total = load(s.total + row, Full{});
    store(lse + row, load(s.top + row, Full{}) * kLn2 + log(total), lanes);
    store(s.total + row, 1.0f / total, Full{});
  });
  for (i64 row = 0; row < count; ++row) {
    T* out = static_cast<T*>(a.out) + ((sample * a.tokens + first + row) * a.heads + head) * a.d;
    write_row(out, s.out, row, column_tiles, a.d, s.total[row]);
  }
}

struct Queries {  // of a task
  i64 sample, head, first, count;
};

SFD_INLINE Queries queries_of(const AttentionArgs& a, i64 task) {
  const i64 per_head = (a.tokens + kQueriesPerTask - 1) / kQueriesPerTask;
  const i64 first = task % per_head * kQueriesPerTask;
  return {task / per_head / a.heads, task / per_head % a.heads, first, smaller(a.tokens - first, kQueriesPerTask)};
}

template <class T>
static void forward(const AttentionArgs& a, i64 begin, i64 end) {
  Scratch memory{a.scratch};
  const ForwardScratch<E> s = forward_scratch<E>(memory, a.tokens, a.d);
  const i64 depth = round_up(a.d, Matrix::kDepth), width = round_up(a.d, kTile);
  for (i64 task = begin; task < end; ++task) {
    const auto [sample, head, first, count] = queries_of(a, task);
    const i64 queries = round_up(count, Matrix::kTokens);
    Matrix::pack_rows(s.q, head_source<T>(a.q, sample, head, first, count, a.d), queries, depth);
    for (i64 from = 0; from < a.tokens; from += kBlockTokens) {
      const i64 inside = smaller(a.tokens - from, kBlockTokens), keys = round_up(inside, Matrix::kTokens);
      Matrix::pack_columns(s.k, head_source<T>(a.k, sample, head, from, inside, a.d), keys, depth);
      Matrix::pack_depth(s.v, head_source<T>(a.v, sample, head, from, inside, a.d), keys);
      for (i64 query = 0; query < queries; query += kTokenStep) {
        const Step step{query, smaller(queries - query, kTokenStep), keys, from == 0};
        const i64 row_tiles = step.queries / kTile;
        Matrix::product<false>(s.scores, s.q + query * depth, s.k, row_tiles, keys / kTile, depth);
        if (inside < keys) hide_padding(s, step, inside);
        softmax_rows(s, step, width, a.scale * kLog2E);
        multiply(from > 0, s.out + query * width, s.weights, s.v, row_tiles, width / kTile, keys);
      }
    }
    write_task<T>(a, s, sample, head, first, count);
  }
}

void attention_tasks(const AttentionArgs& a, i64 begin, i64 end) {
  Matrix::begin();
  with_input_type(a.dtype, [&]<class T>(T*) { forward<T>(a, begin, end); });
  Matrix::end();
}

}  // namespace sfd::SFD_ISA
#else
#include <cmath>

namespace sfd {

static bool is_supported(const Tensor& q, const Tensor& k, const Tensor& v) {
  return q.dim() == 4 && is_kernel_dtype(q) && same_dtype(q, k) && same_dtype(q, v) && same_shape(q, k) &&
         same_shape(q, v) && q.size(3) >= 1 && q.size(3) <= kMaxAttentionDim;
}

static std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v) {
  if (!is_supported(q, k, v)) return reference<std::tuple<Tensor, Tensor> >("attention", q, k, v);
  const i64 batch = q.size(0), tokens = q.size(1), heads = q.size(2), d = q.size(3);
  const Tensor out = fresh_like(q), lse = fresh({batch, heads, tokens}, ScalarType::Float);
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
  const AttentionArgs args{
      dtype_of(q), head_rows(q), head_rows(k), head_rows(v), output(out), output<float>(lse), tokens, heads,
      d,           scale,        nullptr};
  Scratch needed{nullptr};
  forward_scratch<float>(needed, tokens, d);
  const i64 tasks = batch * heads * ceil_div(tokens, kQueriesPerTask);
  run(q.scalar_type() == ScalarType::BFloat16 ? attention_tasks_bf16 : attention_tasks, args, tasks,
      grain(std::min(tokens, kQueriesPerTask) * tokens), needed.bytes);
  return {out, lse};
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) { m.impl("attention", TORCH_BOX(&sfd::attention)); }
#endif
