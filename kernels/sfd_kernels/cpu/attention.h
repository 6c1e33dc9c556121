// softmax(q k^T / sqrt(d)) v: what its forward and backward kernels share.
//
// Heads are packed block by block, with zeros up to a multiple of Matrix::kTokens tokens, into scratch memory that
// stays in a core's second cache (512 KiB at head_dim 72), and multiplied there: see matrix.h. Exponents are to base 2,
// so that the scale, log2(e) and the maximum cost one multiplication and addition.
#pragma once

#include "elementary.h"
#include "heads.h"
#include "matrix_bf16.h"

namespace sfd {

struct AttentionArgs {
  Dtype dtype;
  HeadRows q, k, v;
  void* out;   // (B, N, H, d)
  float* lse;  // (B, H, N)
  i64 tokens, heads, d;
  float scale;
  char* scratch;
};

struct AttentionBackwardArgs {
  Dtype dtype;
  HeadRows q, k, v, out, dout;
  const float *lse, *dlse;  // (B, H, N); dlse may be null
  void *dq, *dk, *dv;       // (B, N, H, d)
  i64 tokens, heads, d;
  float scale;
  char* scratch;
};

inline constexpr i64 kQueriesPerTask = 512;  // a task packs the keys and values of its head anew: 3 % at 512 queries
inline constexpr i64 kBlockTokens = 256;     // keys (forward), queries and keys (backward) that are packed at a time
inline constexpr i64 kTokenStep = 32;        // queries (forward), keys and queries (backward) multiplied at a time
inline constexpr i64 kMaxAttentionDim = 256;

// A part of the scratch memory, in elements of 4 bytes; bf16 operands use half of theirs. Start from 0 counts the
// memory that a task needs.
struct Scratch {
  char* start;
  i64 bytes = 0;

  template <class T>
  __attribute__((always_inline)) T* take(i64 elements) {
    T* found = reinterpret_cast<T*>(start + bytes);
    bytes += (elements * 4 + 63) / 64 * 64;
    return found;
  }
};

template <class E>
struct ForwardScratch {
  E *q, *k, *v, *weights;
  float *scores, *out, *top, *total;
};

template <class E>
struct BackwardScratch {
  E *q, *dout, *q_depth, *dout_depth, *k, *v, *k_transposed, *weights, *dscores, *dscores_depth;
  float *scores, *dweights, *dq, *dk, *dv, *lse, *delta;
};

static inline __attribute__((always_inline)) i64 padded(i64 n, i64 step) { return (n + step - 1) / step * step; }
static inline __attribute__((always_inline)) i64 smaller(i64 n, i64 most) { return n < most ? n : most; }

template <class E>
static inline __attribute__((always_inline)) ForwardScratch<E> forward_scratch(Scratch& s, i64 tokens, i64 d) {
  const i64 queries = smaller(padded(tokens, kTokenStep), kQueriesPerTask);
  const i64 keys = smaller(padded(tokens, kTokenStep), kBlockTokens), depth = padded(d, 32), width = padded(d, 16);
  ForwardScratch<E> x;
  x.q = s.take<E>(queries * depth), x.k = s.take<E>(keys * depth), x.v = s.take<E>(keys * width);
  x.weights = s.take<E>(kTokenStep * keys), x.scores = s.take<float>(kTokenStep * keys);
  x.out = s.take<float>(queries * width), x.top = s.take<float>(queries), x.total = s.take<float>(queries);
  return x;
}

template <class E>
static inline __attribute__((always_inline)) BackwardScratch<E> backward_scratch(Scratch& s, i64 tokens, i64 d) {
  const i64 all = padded(tokens, kTokenStep), block = smaller(all, kBlockTokens);
  const i64 depth = padded(d, 32), width = padded(d, 16);
  BackwardScratch<E> x;
  x.q = s.take<E>(block * depth), x.dout = s.take<E>(block * depth);
  x.q_depth = s.take<E>(block * width), x.dout_depth = s.take<E>(block * width);
  x.k = s.take<E>(block * depth), x.v = s.take<E>(block * depth), x.k_transposed = s.take<E>(block * width);
  x.weights = s.take<E>(kTokenStep * block), x.dscores = s.take<E>(kTokenStep * block);
  x.dscores_depth = s.take<E>(block * block);
  x.scores = s.take<float>(kTokenStep * kTokenStep), x.dweights = s.take<float>(kTokenStep * kTokenStep);
  x.dq = s.take<float>(block * width), x.dk = s.take<float>(all * width), x.dv = s.take<float>(all * width);
  x.lse = s.take<float>(block), x.delta = s.take<float>(block);
  return x;
}

}  // namespace sfd

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// What the kernel of this instruction set multiplies with, and f called with a null pointer of the tensors' type.
#if defined(__AVX512BF16__)
using Matrix = Bf16Matrix;
template <class F>
SFD_INLINE void with_input_type(Dtype, F&& f) {
  f(static_cast<BF16*>(nullptr));
}
#else
using Matrix = FloatMatrix;
template <class F>
SFD_INLINE void with_input_type(Dtype dtype, F&& f) {
  with_type(dtype, f);
}
#endif

inline constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// C += A B where `add` says so, else C = A B.
SFD_INLINE void multiply(bool add, float* c, const Matrix::Element* a, const Matrix::Element* b, i64 row_tiles,
                         i64 column_tiles, i64 depth) {
  if (add) {
    Matrix::product<true>(c, a, b, row_tiles, column_tiles, depth);
  } else {
    Matrix::product<false>(c, a, b, row_tiles, column_tiles, depth);
  }
}

// A head's tokens from `first` on, `count` of them.
template <class T>
SFD_INLINE Source<T> head_source(const HeadRows& x, i64 sample, i64 head, i64 first, i64 count, i64 d) {
  return {static_cast<const T*>(x.data) + sample * x.batch + head * x.head + first * x.token, x.token, count, d};
}

// Row `row`, column k of a result in tiles: where a vector of it lies.
SFD_INLINE float* in_tiles(float* c, i64 row, i64 columns, i64 k) {
  return c + row / kTile * columns * kTile + k / kTile * kBlock + row % kTile * kTile + k % kTile;
}

// Row `row` of a result in tiles, times `factor`, to d elements of a dtype.
template <class T>
SFD_INLINE void write_row(T* to, const float* c, i64 row, i64 column_tiles, i64 d, float factor) {
  const float* from = c + row / kTile * column_tiles * kBlock + row % kTile * kTile;
  for (i64 dim = 0; dim < d; dim += kTile)
    sweep(d - dim < kTile ? d - dim : kTile,
          [&](i64 i, auto lanes) { store(to + dim + i, load(from + dim * kTile + i, Full{}) * factor, lanes); });
}

}  // namespace sfd::SFD_ISA
#endif
