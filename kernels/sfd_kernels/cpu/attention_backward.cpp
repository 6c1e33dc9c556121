// Attention, backward. With P the weights, recomputed from the scores and their log-sum-exp, and
//   dP = dO V^T,  dS = P (dP - rowsum(dO O) + dlse),
// the gradients are dV = P^T dO, dK = dS^T Q scale, dQ = dS K scale. A task is one head of one sample.
//
// Scores are computed transposed, keys by queries: P^T and dS^T are then rows for dV and dK as they come, and
// dQ^T = K^T dS^T takes the same rows as its depth.
#include "attention.h"

SFD_BF16_KERNEL(attention_backward_tasks, AttentionBackwardArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

using E = Matrix::Element;
using Vectors = vf[Matrix::kVectors];

struct Block {  // tokens from `first` on: `count` of them, `padded` with zeros
  i64 first, count, padded;
};

SFD_INLINE Block block_at(i64 first, i64 tokens) {
  const i64 count = smaller(tokens - first, kBlockTokens);
  return {first, count, round_up(count, Matrix::kTokens)};
}

// lse of the block's queries to base 2, and delta = rowsum(dO O) - dlse.
template <class T>
static void query_statistics(const AttentionBackwardArgs& a, const BackwardScratch<E>& s, i64 sample, i64 head,
                             const Block& queries) {
  const Source<T> out = head_source<T>(a.out, sample, head, queries.first, queries.count, a.d);
  const Source<T> dout = head_source<T>(a.dout, sample, head, queries.first, queries.count, a.d);
  const i64 row = (sample * a.heads + head) * a.tokens + queries.first;
  for (i64 query = 0; query < queries.count; ++query) {
    const float product = Matrix::dot(out.data + query * out.stride, dout.data + query * dout.stride, a.d);
    s.lse[query] = a.lse[row + query] * kLog2E;
    s.delta[query] = product - (a.dlse ? a.dlse[row + query] : 0.0f);
  }
  fill(s.lse + queries.count, 0.0f, queries.padded - queries.count);
  fill(s.delta + queries.count, 0.0f, queries.padded - queries.count);
}

struct Step {  // some keys of a block and some of its queries, padded
  i64 key, keys, query, queries;
};

// P and dS of one key (a row of the scores) and Matrix::kTokens queries from column n on.
SFD_INLINE void weights_of_key(const BackwardScratch<E>& s, const Step& x, i64 row, i64 n, float factor,
                               Vectors& weights, Vectors& dscores) {
  for (int i = 0; i < Matrix::kVectors; ++i, n += W) {
    const vf score = load(in_tiles(s.scores, row, x.queries, n), Full{});
    const vf dweight = load(in_tiles(s.dweights, row, x.queries, n), Full{});
    weights[i] = exp2<Matrix::kExpDegree>(score * factor - load(s.lse + x.query + n, Full{}));
    dscores[i] = weights[i] * (dweight - load(s.delta + x.query + n, Full{}));
  }
}

// The same for all of a step, put where the products find them. Keys past the block's last have dS = 0; their P meets
// nothing but rows of dV that are not written.
static void score_gradients(const BackwardScratch<E>& s, const Step& x, const Block& keys, const Block& queries,
                            float factor) {
  for (i64 row = 0; row < x.keys; row += 2)
    for (i64 n = 0; n < x.queries; n += Matrix::kTokens) {
      Matrix::Row pair[2];
      for (int i = 0; i < 2; ++i) {
        Vectors weights, dscores;
        weights_of_key(s, x, row + i, n, factor, weights, dscores);
        if (x.key + row + i >= keys.count)
          for (vf& dscore : dscores) dscore = vf{};
        Matrix::put_row(s.weights, queries.padded, row + i, x.query + n, Matrix::rounded(weights));
        pair[i] = Matrix::rounded(dscores);
        Matrix::put_row(s.dscores, queries.padded, row + i, x.query + n, pair[i]);
      }
      Matrix::put_pair(s.dscores_depth, keys.padded, x.key + row, x.query + n, pair[0], pair[1]);
    }
}

// A block of queries with a block of keys: adds to dQ^T (unless they are the first keys), dK and dV (the first
// queries).
template <class T>
static void key_block(const AttentionBackwardArgs& a, const BackwardScratch<E>& s, i64 sample, i64 head,
                      const Block& queries, const Block& keys) {
  const i64 depth = round_up(a.d, Matrix::kDepth), width = round_up(a.d, kTile);
  const Source<T> k = head_source<T>(a.k, sample, head, keys.first, keys.count, a.d);
  const Source<T> v = head_source<T>(a.v, sample, head, keys.first, keys.count, a.d);
  Matrix::pack_rows(s.k, k, keys.padded, depth);
  Matrix::pack_transposed(s.k_transposed, k, keys.padded);
  Matrix::pack_rows(s.v, v, keys.padded, depth);
  for (i64 key = 0; key < keys.padded; key += kTokenStep) {
    const i64 step_keys = smaller(keys.padded - key, kTokenStep), row_tiles = step_keys / kTile;
    for (i64 query = 0; query < queries.padded; query += kTokenStep) {
      const Step step{key, step_keys, query, smaller(queries.padded - query, kTokenStep)};
      const i64 column_tiles = step.queries / kTile;
      Matrix::product<false>(s.scores, s.k + key * depth, s.q + query * depth, row_tiles, column_tiles, depth);
      Matrix::product<false>(s.dweights, s.v + key * depth, s.dout + query * depth, row_tiles, column_tiles, depth);
      score_gradients(s, step, keys, queries, a.scale * kLog2E);
    }
    const bool add = queries.first > 0;
    const i64 row = (keys.first + key) * width;
    multiply(add, s.dv + row, s.weights, s.dout_depth, row_tiles, width / kTile, queries.padded);
    multiply(add, s.dk + row, s.dscores, s.q_depth, row_tiles, width / kTile, queries.padded);
  }
  multiply(keys.first > 0, s.dq, s.k_transposed, s.dscores_depth, width / kTile, queries.padded / kTile, keys.padded);
}

// dQ^T, in tiles of dims by queries, to dQ.
template <class T>
static void write_transposed(const AttentionBackwardArgs& a, const float* c, i64 sample, i64 head,
                             const Block& queries) {
  for (i64 query = 0; query < queries.count; query += W) {
    for (i64 dim = 0; dim < a.d; dim += W) {
      vf rows[W];
      for (int i = 0; i < W; ++i)
        rows[i] = load(c + (dim / kTile * queries.padded + query / kTile * kTile) * kTile + (dim % kTile + i) * kTile +
                           query % kTile,
                       Full{});
      transpose(rows);
      const i64 width = smaller(a.d - dim, W), last = smaller(queries.count - query, W);
      for (i64 i = 0; i < last; ++i) {
        T* to = static_cast<T*>(a.dq) + ((sample * a.tokens + queries.first + query + i) * a.heads + head) * a.d + dim;
        sweep(width, [&](i64, auto lanes) { store(to, rows[i] * a.scale, lanes); });
      }
    }
  }
}

template <class T>
static void backward(const AttentionBackwardArgs& a, i64 begin, i64 end) {
  Scratch memory{a.scratch};
  const BackwardScratch<E> s = backward_scratch<E>(memory, a.tokens, a.d);
  const i64 depth = round_up(a.d, Matrix::kDepth), column_tiles = round_up(a.d, kTile) / kTile;
  for (i64 task = begin; task < end; ++task) {
    const i64 sample = task / a.heads, head = task % a.heads;
    for (i64 from = 0; from < a.tokens; from += kBlockTokens) {
      const Block queries = block_at(from, a.tokens);
      const Source<T> q = head_source<T>(a.q, sample, head, from, queries.count, a.d);
      const Source<T> dout = head_source<T>(a.dout, sample, head, from, queries.count, a.d);
      Matrix::pack_columns(s.q, q, queries.padded, depth);
      Matrix::pack_depth(s.q_depth, q, queries.padded);
      Matrix::pack_columns(s.dout, dout, queries.padded, depth);
      Matrix::pack_depth(s.dout_depth, dout, queries.padded);
      query_statistics<T>(a, s, sample, head, queries);
      for (i64 key = 0; key < a.tokens; key += kBlockTokens)
        key_block<T>(a, s, sample, head, queries, block_at(key, a.tokens));
      write_transposed<T>(a, s.dq, sample, head, queries);
    }
    for (i64 token = 0; token < a.tokens; ++token) {
      const i64 at = ((sample * a.tokens + token) * a.heads + head) * a.d;
      write_row(static_cast<T*>(a.dk) + at, s.dk, token, column_tiles, a.d, a.scale);
      write_row(static_cast<T*>(a.dv) + at, s.dv, token, column_tiles, a.d, 1.0f);
    }
  }
}

void attention_backward_tasks(const AttentionBackwardArgs& a, i64 begin, i64 end) {
  Matrix::begin();
  with_input_type(a.dtype, [&]<class T>(T*) { backward<T>(a, begin, end); });
  Matrix::end();
}

}  // namespace sfd::SFD_ISA
#else
#include <cmath>

namespace sfd {

static bool is_supported(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                         const Tensor& lse, const OptionalTensor& dlse) {
  if (q.dim() != 4 || !is_kernel_dtype(q) || q.size(3) < 1 || q.size(3) > kMaxAttentionDim) return false;
  for (const Tensor* other : {&dout, &k, &v, &out})
    if (!same_dtype(*other, q) || !same_shape(*other, q)) return false;
  for (const Tensor* row : {&lse, dlse.has_value() ? &*dlse : &lse})
    if (!is_float(*row) || !has_shape(*row, {q.size(0), q.size(2), q.size(1)})) return false;
  return true;
}

static std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                                             Tensor lse, OptionalTensor dlse) {
  if (!is_supported(dout, q, k, v, out, lse, dlse))
    return reference<std::tuple<Tensor, Tensor, Tensor> >("attention_backward", dout, q, k, v, out, lse, dlse);
  const i64 batch = q.size(0), tokens = q.size(1), heads = q.size(2), d = q.size(3);
  const Tensor dq = fresh_like(q), dk = fresh_like(q), dv = fresh_like(q);
  lse = dense(lse);
  if (dlse.has_value()) dlse = dense(*dlse);
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
  const AttentionBackwardArgs args{dtype_of(q),
                                   head_rows(q),
                                   head_rows(k),
                                   head_rows(v),
                                   head_rows(out),
                                   head_rows(dout),
                                   pointer<float>(lse),
                                   dlse.has_value() ? pointer<float>(*dlse) : nullptr,
                                   output(dq),
                                   output(dk),
                                   output(dv),
                                   tokens,
                                   heads,
                                   d,
                                   scale,
                                   nullptr};
  Scratch needed{nullptr};
  backward_scratch<float>(needed, tokens, d);
  run(q.scalar_type() == ScalarType::BFloat16 ? attention_backward_tasks_bf16 : attention_backward_tasks, args,
      batch * heads, grain(tokens * tokens), needed.bytes);
  return {dq, dk, dv};
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) { m.impl("attention_backward", TORCH_BOX(&sfd::attention_backward)); }
#endif
