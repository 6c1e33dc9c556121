// Products of small matrices in fp32: packing, and a block of the result kept in registers.
//
// C (M, N) = A (M, K) B (K, N), with M and N in tiles of 16, zeros where a matrix ends within one:
//   A    row tile i, 16 rows of K elements, lies at a + i * 16 * K, in an order that is the packing's own
//   B    column tile j, K rows of 16 elements, at b + j * 16 * K, likewise
//   C    tile (i, j), 16 rows of 16 floats, at c + (i * number of column tiles + j) * 256
// matrix_bf16.h has the same interface for bf16 operands; the kernels are written once for both.
#pragma once

#include "types.h"

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

inline constexpr int kTile = 16;
inline constexpr i64 kBlock = kTile * kTile;

SFD_INLINE i64 round_up(i64 n, i64 step) { return (n + step - 1) / step * step; }

// Rows of a matrix that lies in memory as tokens by dims; stride in elements.
template <class T>
struct Source {
  const T* data;
  i64 stride, rows, width;
};

// f(dim, token, vector of W tokens) for the transpose of x, W dims and W tokens at a time, zeros past its end. Element
// (dim, token) is number dim of a row: a float made of a T, or 4 bytes as they are where T is float.
template <class T, class F>
SFD_INLINE void for_transposed(const Source<T>& x, i64 rows, F&& f) {
  for (i64 token = 0; token < rows; token += W) {
    sweep(x.width, [&](i64 dim, auto lanes) {
      vf block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        block[i] = token + i < x.rows ? load(x.data + (token + i) * x.stride + dim, lanes) : vf{};
      transpose(block);
      const i64 last = dim + W < x.width ? dim + W : x.width;
      for (i64 i = dim; i < last; ++i) f(i, token, block[i - dim]);
    });
  }
}

struct FloatMatrix {
  using Element = float;
  static constexpr i64 kDepth = 1;       // K is a multiple of it
  static constexpr i64 kTokens = kTile;  // a number of tokens too
  static constexpr int kExpDegree = 5;   // of exp2 for what is only an operand
  static constexpr int kVectors = kTile / W;
  struct Row {  // kTokens elements of a row
    vf part[kVectors];
  };

  static void begin() {}
  static void end() {}

  // A = x, with `rows` rows.
  template <class T>
  static void pack_rows(float* a, const Source<T>& x, i64 rows, i64 depth) {
    for (i64 row = 0; row < rows; ++row) {
      const bool inside = row < x.rows;
      if (inside)
        sweep(x.width,
              [&](i64 i, auto lanes) { store(a + row * depth + i, load(x.data + row * x.stride + i, lanes), lanes); });
      const i64 filled = inside ? x.width : 0;
      fill(a + row * depth + filled, 0.0f, depth - filled);
    }
  }

  // B = x^T, with `tokens` columns.
  template <class T>
  static void pack_columns(float* b, const Source<T>& x, i64 tokens, i64 depth) {
    for_transposed(x, tokens, [&](i64 dim, i64 token, vf column) {
      store(b + (token / kTile * depth + dim) * kTile + token % kTile, column, Full{});
    });
    for (i64 tile = 0; tile < tokens / kTile; ++tile)
      fill(b + (tile * depth + x.width) * kTile, 0.0f, (depth - x.width) * kTile);
  }

  // B = x, with `tokens` rows.
  template <class T>
  static void pack_depth(float* b, const Source<T>& x, i64 tokens) {
    for (i64 tile = 0; tile * kTile < x.width; ++tile) {
      const i64 dim = tile * kTile, inside = x.width - dim < kTile ? x.width - dim : kTile;
      for (i64 token = 0; token < tokens; ++token) {
        float* row = b + (tile * tokens + token) * kTile;
        const i64 filled = token < x.rows ? inside : 0;
        sweep(filled,
              [&](i64 i, auto lanes) { store(row + i, load(x.data + token * x.stride + dim + i, lanes), lanes); });
        fill(row + filled, 0.0f, kTile - filled);
      }
    }
  }

  // A = x^T, with `tokens` columns and rows to the end of a tile.
  template <class T>
  static void pack_transposed(float* a, const Source<T>& x, i64 tokens) {
    for_transposed(x, tokens, [&](i64 dim, i64 token, vf column) { store(a + dim * tokens + token, column, Full{}); });
    fill(a + x.width * tokens, 0.0f, (round_up(x.width, kTile) - x.width) * tokens);
  }

  static SFD_INLINE Row rounded(const vf (&x)[kVectors]) {
    Row row;
    for (int i = 0; i < kVectors; ++i) row.part[i] = x[i];
    return row;
  }

  // Sum of the products of n elements.
  template <class T>
  static SFD_INLINE float dot(const T* x, const T* y, i64 n) {
    vf sums = {};
    sweep(n, [&](i64 i, auto lanes) { sums += load(x + i, lanes) * load(y + i, lanes); });
    return sum(sums);
  }

  // Elements from column k on of a row of A.
  static SFD_INLINE void put_row(float* a, i64 depth, i64 row, i64 k, const Row& x) {
    for (int i = 0; i < kVectors; ++i) store(a + row * depth + k + i * W, x.part[i], Full{});
  }

  // Elements from column n on of the rows k and k + 1 of B.
  static SFD_INLINE void put_pair(float* b, i64 depth, i64 k, i64 n, const Row& first, const Row& second) {
    float* to = b + n * depth + k * kTile;
    for (int i = 0; i < kVectors; ++i) {
      store(to + i * W, first.part[i], Full{});
      store(to + kTile + i * W, second.part[i], Full{});
    }
  }

  // C = A B, or C += A B.
  template <bool Add>
  static void product(float* c, const float* a, const float* b, i64 row_tiles, i64 column_tiles, i64 depth) {
    i64 j = 0;
    for (; j + kColumns <= column_tiles; j += kColumns)
      columns<kColumns, Add>(c, a, b, row_tiles, column_tiles, depth, j);
    if constexpr (kColumns > 2) {
      if (j + 2 <= column_tiles) columns<2, Add>(c, a, b, row_tiles, column_tiles, depth, j), j += 2;
    }
    if (j < column_tiles) columns<1, Add>(c, a, b, row_tiles, column_tiles, depth, j);
  }

 private:
  // Of 32 registers 24 hold the result (8 rows of 3 tiles), of 16 with fused multiplication 8 (4 rows of 2 vectors).
  static constexpr int kColumns = W == 16 ? 3 : 1, kRows = W == 16 ? 8 : W == 8 ? 4 : 2;

  template <int N, bool Add>
  static void columns(float* c, const float* a, const float* b, i64 row_tiles, i64 column_tiles, i64 depth, i64 j) {
    for (i64 row = 0; row < row_tiles * kTile; row += kRows) {
      float* to = c + (row / kTile * column_tiles + j) * kBlock + row % kTile * kTile;
      block<N, Add>(to, a + row * depth, b + j * kTile * depth, depth);
    }
  }

  template <int N, bool Add>
  static SFD_INLINE void block(float* c, const float* a, const float* b, i64 depth) {
    constexpr int vectors = kTile / W;
    vf sum[kRows][N * vectors];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
      for (int v = 0; v < N * vectors; ++v)
        sum[row][v] = Add ? load(c + v / vectors * kBlock + row * kTile + v % vectors * W, Full{}) : vf{};
    for (i64 k = 0; k < depth; ++k) {
      vf right[N * vectors];
#pragma GCC unroll 16
      for (int v = 0; v < N * vectors; ++v)
        right[v] = load(b + (v / vectors * depth + k) * kTile + v % vectors * W, Full{});
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const vf left = splat(a[row * depth + k]);
#pragma GCC unroll 16
        for (int v = 0; v < N * vectors; ++v) sum[row][v] += left * right[v];
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
      for (int v = 0; v < N * vectors; ++v)
        store(c + v / vectors * kBlock + row * kTile + v % vectors * W, sum[row][v], Full{});
  }
};

}  // namespace sfd::SFD_ISA
#endif
