// The products of matrix.h for bf16 operands with fp32 sums, on AMX tiles or, without those, AVX-512's dot products.
//
// Both multiply pairs of neighbours along the depth: a row of A holds its elements as they come, a row of B holds two
// rows of the matrix, interleaved. 32 of depth make a tile of A (16 rows of 32) and one of B (16 pairs of rows by 16
// columns), 1 KiB each, and the tiles of a row (A) or column (B) follow each other.
#pragma once

#include "matrix.h"

#if defined(SFD_ISA) && defined(__AVX512BF16__)
namespace sfd::SFD_ISA {

inline constexpr i64 kTileDepth = 32;
inline constexpr i64 kOperandTile = kTile * kTileDepth;  // elements

// What a thread tells its AMX unit before it uses it: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Bf16Matrix {
  using Element = BF16;
  static constexpr i64 kDepth = kTileDepth;
  static constexpr i64 kTokens = kTileDepth;
  static constexpr int kExpDegree = 4;
  static constexpr int kVectors = 2;
  using Row = __m512i;  // kTokens elements of a row

#if defined(__AMX_BF16__)
  static void begin() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }
#else
  static void begin() {}
  static void end() {}
#endif

  // ---- packing ----

  // A = x, with `rows` rows.
  static void pack_rows(BF16* a, const Source<BF16>& x, i64 rows, i64 depth) {
    for (i64 row = 0; row < rows; ++row)
      for (i64 k = 0; k < depth; k += kTileDepth)
        _mm512_store_si512(a + row / kTile * kTile * depth + k * kTile + row % kTile * kTileDepth, piece(x, row, k));
  }

  // B = x^T, with `tokens` columns.
  static void pack_columns(BF16* b, const Source<BF16>& x, i64 tokens, i64 depth) {
    for (i64 token = 0; token < tokens; token += kTile)
      for (i64 k = 0; k < depth; k += kTileDepth) {
        vf pairs[W];
        transposed_pairs(pairs, x, token, k);
        for (int i = 0; i < W; ++i) put(b + token * depth + (k + 2 * i) * kTile, pairs[i]);
      }
  }

  // B = x, with `tokens` rows.
  static void pack_depth(BF16* b, const Source<BF16>& x, i64 tokens) {
    for (i64 dim = 0; dim < x.width; dim += kTileDepth)
      for (i64 token = 0; token < tokens; token += 2) {
        __m512i left, right;
        interleave(piece(x, token, dim), piece(x, token + 1, dim), left, right);
        BF16* to = b + dim * tokens + token * kTile;
        _mm512_store_si512(to, left);
        if (dim + kTile < x.width) _mm512_store_si512(to + kTile * tokens, right);
      }
  }

  // A = x^T, with `tokens` columns and rows to the end of a tile.
  static void pack_transposed(BF16* a, const Source<BF16>& x, i64 tokens) {
    alignas(64) static constexpr uint16_t even[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                      32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const __m512i of_even = _mm512_load_si512(even), of_odd = _mm512_add_epi16(of_even, _mm512_set1_epi16(1));
    for (i64 token = 0; token < tokens; token += kTileDepth)
      for (i64 k = 0; k < x.width; k += kTileDepth) {
        vf first[W], second[W];
        transposed_pairs(first, x, token, k);
        transposed_pairs(second, x, token + kTile, k);
        const i64 last = round_up(x.width - k, kTile) < kTileDepth ? kTile / 2 : kTile;  // pairs
        for (i64 i = 0; i < last; ++i) {
          const __m512i x0 = bits<__m512i>(first[i]), x1 = bits<__m512i>(second[i]);
          const i64 row = k + 2 * i;
          BF16* to = a + row / kTile * kTile * tokens + token * kTile + row % kTile * kTileDepth;
          _mm512_store_si512(to, _mm512_permutex2var_epi16(x0, of_even, x1));
          _mm512_store_si512(to + kTileDepth, _mm512_permutex2var_epi16(x0, of_odd, x1));
        }
      }
  }

  // ---- rows that a kernel computes ----

  static SFD_INLINE Row rounded(const vf (&x)[kVectors]) {
    return bits<__m512i>(_mm512_cvtne2ps_pbh(bits<__m512>(x[1]), bits<__m512>(x[0])));
  }

  // Sum of the products of n elements.
  static SFD_INLINE float dot(const BF16* x, const BF16* y, i64 n) {
    __m512 sums = _mm512_setzero_ps();
    for (i64 i = 0; i < n; i += kTileDepth)
      sums = _mm512_dpbf16_ps(sums, bits<__m512bh>(some(x + i, n - i)), bits<__m512bh>(some(y + i, n - i)));
    return _mm512_reduce_add_ps(sums);
  }

  // Elements from column k on of a row of A.
  static SFD_INLINE void put_row(BF16* a, i64 depth, i64 row, i64 k, Row x) {
    _mm512_store_si512(a + row / kTile * kTile * depth + k * kTile + row % kTile * kTileDepth, x);
  }

  // Elements from column n on of the rows k and k + 1 of B.
  static SFD_INLINE void put_pair(BF16* b, i64 depth, i64 k, i64 n, Row first, Row second) {
    __m512i left, right;
    interleave(first, second, left, right);
    _mm512_store_si512(b + n * depth + k * kTile, left);
    _mm512_store_si512(b + (n + kTile) * depth + k * kTile, right);
  }

  // ---- products ----

  // C = A B, or C += A B.
  template <bool Add>
  static void product(float* c, const BF16* a, const BF16* b, i64 row_tiles, i64 column_tiles, i64 depth) {
    asm volatile("" ::: "memory");  // some compilers think that loading a tile reads no memory
    for (i64 i = 0; i < row_tiles; i += 2)
      for (i64 j = 0; j < column_tiles; j += 2) {
        float* to = c + (i * column_tiles + j) * kBlock;
        const BF16 *left = a + i * kTile * depth, *right = b + j * kTile * depth;
        const bool two_rows = i + 1 < row_tiles, two_columns = j + 1 < column_tiles;
        if (two_rows && two_columns) {
          tiles<2, 2, Add>(to, left, right, column_tiles, depth);
        } else if (two_columns) {
          tiles<1, 2, Add>(to, left, right, column_tiles, depth);
        } else if (two_rows) {
          tiles<2, 1, Add>(to, left, right, column_tiles, depth);
        } else {
          tiles<1, 1, Add>(to, left, right, column_tiles, depth);
        }
      }
  }

 private:
  // The first 32 of n elements, zeros past their end.
  static SFD_INLINE __m512i some(const BF16* x, i64 n) {
    return _mm512_maskz_loadu_epi16(n >= kTileDepth ? ~0u : n > 0 ? (1u << n) - 1u : 0u, x);
  }

  // Elements k to k + 31 of a token, zeros past its end and past the last token.
  static SFD_INLINE __m512i piece(const Source<BF16>& x, i64 token, i64 k) {
    return some(x.data + token * x.stride + k, token < x.rows ? x.width - k : 0);
  }

  // Pairs of elements k + 2 i of 16 tokens.
  static SFD_INLINE void transposed_pairs(vf (&pairs)[W], const Source<BF16>& x, i64 token, i64 k) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) pairs[i] = bits<vf>(piece(x, token + i, k));
    transpose(pairs);
  }

  static SFD_INLINE void put(BF16* to, vf pairs) { _mm512_store_ps(to, bits<__m512>(pairs)); }

  // first[0] second[0] first[1] second[1] ...: 16 pairs each.
  static SFD_INLINE void interleave(__m512i first, __m512i second, __m512i& left, __m512i& right) {
    const __m512i low = _mm512_unpacklo_epi16(first, second), high = _mm512_unpackhi_epi16(first, second);
    left = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
    right = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
  }

#if defined(__AMX_BF16__)
  // M by N tiles of C, at most 2 by 2: tiles 0 to 3, with the tiles of A in 4 and 5 and of B in 6 and 7.
  template <int M, int N, bool Add>
  static SFD_INLINE void tiles(float* c, const BF16* a, const BF16* b, i64 column_tiles, i64 depth) {
    float* below = c + column_tiles * kBlock;
    if constexpr (Add) {
      _tile_loadd(0, c, 64);
      if constexpr (N > 1) _tile_loadd(1, c + kBlock, 64);
      if constexpr (M > 1) _tile_loadd(2, below, 64);
      if constexpr (M > 1 && N > 1) _tile_loadd(3, below + kBlock, 64);
    } else {
      _tile_zero(0);
      if constexpr (N > 1) _tile_zero(1);
      if constexpr (M > 1) _tile_zero(2);
      if constexpr (M > 1 && N > 1) _tile_zero(3);
    }
    for (i64 k = 0; k < depth; k += kTileDepth) {
      _tile_loadd(4, a + k * kTile, 64);
      _tile_loadd(6, b + k * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N > 1) {
        _tile_loadd(7, b + (depth + k) * kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (M > 1) {
        _tile_loadd(5, a + (depth + k) * kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, 64);
    if constexpr (N > 1) _tile_stored(1, c + kBlock, 64);
    if constexpr (M > 1) _tile_stored(2, below, 64);
    if constexpr (M > 1 && N > 1) _tile_stored(3, below + kBlock, 64);
  }
#else
  // The same in vectors: 8 rows of C at a time, a vector for each of their tiles.
  template <int M, int N, bool Add>
  static SFD_INLINE void tiles(float* c, const BF16* a, const BF16* b, i64 column_tiles, i64 depth) {
    constexpr int rows = 8;
    for (int from = 0; from < M * kTile; from += rows) {
      float* to = c + from / kTile * column_tiles * kBlock + from % kTile * kTile;
      const BF16* left = a + from / kTile * kTile * depth + from % kTile * kTileDepth;
      __m512 sum[rows][N];
#pragma GCC unroll 16
      for (int row = 0; row < rows; ++row)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j)
          sum[row][j] = Add ? _mm512_load_ps(to + j * kBlock + row * kTile) : _mm512_setzero_ps();
      for (i64 k = 0; k < depth; k += 2) {
        const BF16* pairs = left + k / kTileDepth * kOperandTile + k % kTileDepth;
        __m512i right[N];
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) right[j] = _mm512_load_si512(b + (j * depth + k) * kTile);
#pragma GCC unroll 16
        for (int row = 0; row < rows; ++row) {
          const __m512i pair = _mm512_set1_epi32(load_raw<int32_t>(pairs + row * kTileDepth));
#pragma GCC unroll 2
          for (int j = 0; j < N; ++j)
            sum[row][j] = _mm512_dpbf16_ps(sum[row][j], bits<__m512bh>(pair), bits<__m512bh>(right[j]));
        }
      }
#pragma GCC unroll 16
      for (int row = 0; row < rows; ++row)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) _mm512_store_ps(to + j * kBlock + row * kTile, sum[row][j]);
    }
  }
#endif
};

}  // namespace sfd::SFD_ISA
#endif
