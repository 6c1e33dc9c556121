// SIMD vectors of one instruction set. A kernel file is compiled once per instruction set, with SFD_ISA naming the
// namespace (avx512, avx2, baseline) and -march giving the width; cpu.h picks the one for this machine at run time.
//
// GCC vector extensions carry the arithmetic, so that a kernel reads like its formula; intrinsics appear only where the
// extensions have no operator. No standard container or other inline function with external linkage may be used in a
// kernel: the linker keeps one copy of such a function, and that copy might use instructions that this machine lacks.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sfd {

using i64 = int64_t;

enum class Dtype : int { f32, bf16, f16 };

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

#ifdef SFD_ISA
namespace SFD_ISA {

#define SFD_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define SFD_AVX512 1
inline constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SFD_AVX2 1
inline constexpr int W = 8;
#else
inline constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef double vd __attribute__((vector_size(W * 4)));         // W / 2 lanes
typedef int64_t vl __attribute__((vector_size(W * 4)));        // W / 2 lanes
typedef uint32_t vu_half __attribute__((vector_size(W * 2)));  // W / 2 lanes, to go with vd
typedef float vf_half __attribute__((vector_size(W * 2)));

template <class To, class From>
SFD_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

SFD_INLINE vf splat(float x) { return x - vf{}; }
SFD_INLINE vd splat_d(double x) { return x - vd{}; }

// ---- memory: a full vector, or the first n elements with zeros behind them ----

struct Full {};
struct Part {
  int n;
};

template <class T>
SFD_INLINE T load_raw(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

SFD_INLINE vf widen(vh h, const BF16*) { return bits<vf>(__builtin_convertvector(h, vu) << 16); }

// Round to nearest, ties to even; a NaN keeps its sign and becomes quiet. The instruction, which kernels that multiply
// in bf16 have, makes 0 of numbers below 2^-126.
SFD_INLINE vh narrow(vf v, const BF16*) {
#if defined(__AVX512BF16__)
  return bits<vh>(_mm512_cvtneps_pbh(bits<__m512>(v)));
#else
  const vu u = bits<vu>(v);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (u >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : nan, vh);
#endif
}

SFD_INLINE vf widen(vh h, const F16*) {
#if SFD_AVX512
  return bits<vf>(_mm512_cvtph_ps(bits<__m256i>(h)));
#elif SFD_AVX2
  return bits<vf>(_mm256_cvtph_ps(bits<__m128i>(h)));
#else
  vf v;
  for (int i = 0; i < W; ++i) {
    _Float16 x;
    const uint16_t b = h[i];
    __builtin_memcpy(&x, &b, 2);
    v[i] = static_cast<float>(x);
  }
  return v;
#endif
}

SFD_INLINE vh narrow(vf v, const F16*) {
#if SFD_AVX512
  return bits<vh>(_mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif SFD_AVX2
  return bits<vh>(_mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  vh h;
  for (int i = 0; i < W; ++i) {
    const _Float16 x = static_cast<_Float16>(v[i]);
    uint16_t b;
    __builtin_memcpy(&b, &x, 2);
    h[i] = b;
  }
  return h;
#endif
}

SFD_INLINE vf load(const float* p, Full) { return load_raw<vf>(p); }
template <class T>
SFD_INLINE vf load(const T* p, Full) {
  return widen(load_raw<vh>(p), p);
}

SFD_INLINE void store(float* p, vf v, Full) { __builtin_memcpy(p, &v, sizeof v); }
template <class T>
SFD_INLINE void store(T* p, vf v, Full) {
  const vh h = narrow(v, p);
  __builtin_memcpy(p, &h, sizeof h);
}

SFD_INLINE vf load(const float* p, Part part) {
#if SFD_AVX512
  return bits<vf>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << part.n) - 1u), p));
#else
  vf v = {};
  std::memcpy(&v, p, part.n * sizeof(float));
  return v;
#endif
}
template <class T>
SFD_INLINE vf load(const T* p, Part part) {
  vh h = {};
  std::memcpy(&h, p, part.n * sizeof(T));
  return widen(h, p);
}

SFD_INLINE void store(float* p, vf v, Part part) {
#if SFD_AVX512
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << part.n) - 1u), bits<__m512>(v));
#else
  std::memcpy(p, &v, part.n * sizeof(float));
#endif
}
template <class T>
SFD_INLINE void store(T* p, vf v, Part part) {
  const vh h = narrow(v, p);
  std::memcpy(p, &h, part.n * sizeof(T));
}

// Past the caches (non-temporal): the line is neither read before the write nor kept after it. Worth it for outputs
// that a cache does not hold until they are read. p must be aligned to the vector.
SFD_INLINE void stream(float* p, vf v) {
#if SFD_AVX512
  _mm512_stream_ps(p, bits<__m512>(v));
#elif SFD_AVX2
  _mm256_stream_ps(p, bits<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(p, bits<__m128>(v));
#else
  store(p, v, Full{});
#endif
}
template <class T>
SFD_INLINE void stream(T* p, vf v) {
#if SFD_AVX512
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits<__m256i>(narrow(v, p)));
#elif SFD_AVX2
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits<__m128i>(narrow(v, p)));
#else
  store(p, v, Full{});
#endif
}

// Store past the caches where Stream says so and the vector is full, else an ordinary store.
template <bool Stream, class T>
SFD_INLINE void put(T* p, vf v, Full lanes) {
  if constexpr (Stream) {
    stream(p, v);
  } else {
    store(p, v, lanes);
  }
}
template <bool Stream, class T>
SFD_INLINE void put(T* p, vf v, Part lanes) {
  store(p, v, lanes);
}

// Streaming stores become visible to other threads in order with what follows.
SFD_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// f(i, full or part) for every vector of n elements, the part last.
template <class F>
SFD_INLINE void sweep(i64 n, F&& f) {
  i64 i = 0;
  for (; i + W <= n; i += W) f(i, Full{});
  if (i < n) f(i, Part{static_cast<int>(n - i)});
}

// The same, U vectors a turn: f(i, full or part, k) with k < U known to the compiler, so that k may index a small array
// of accumulators that stays in registers. The order of additions depends on n alone.
template <int U, class F>
SFD_INLINE void sweep(i64 n, F&& f) {
  i64 i = 0;
  for (; i + U * W <= n; i += U * W) {
#pragma GCC unroll 8
    for (int k = 0; k < U; ++k) f(i + k * W, Full{}, k);
  }
  for (; i + W <= n; i += W) f(i, Full{}, 0);
  if (i < n) f(i, Part{static_cast<int>(n - i)}, 0);
}

SFD_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// Into the second cache alone: lines a power of two apart drive each other out of the first.
SFD_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- arithmetic without an operator ----

// Both keep a NaN of x, as (x op bound) is then false.
SFD_INLINE vf at_most(vf x, float bound) {
#if SFD_AVX512
  return bits<vf>(_mm512_min_ps(_mm512_set1_ps(bound), bits<__m512>(x)));
#elif SFD_AVX2
  return bits<vf>(_mm256_min_ps(_mm256_set1_ps(bound), bits<__m256>(x)));
#else
  const vf b = splat(bound);
  return b < x ? b : x;
#endif
}
SFD_INLINE vf at_least(vf x, float bound) {
#if SFD_AVX512
  return bits<vf>(_mm512_max_ps(_mm512_set1_ps(bound), bits<__m512>(x)));
#elif SFD_AVX2
  return bits<vf>(_mm256_max_ps(_mm256_set1_ps(bound), bits<__m256>(x)));
#else
  const vf b = splat(bound);
  return b > x ? b : x;
#endif
}

SFD_INLINE vf sqrt(vf x) {
#if SFD_AVX512
  return bits<vf>(_mm512_sqrt_ps(bits<__m512>(x)));
#elif SFD_AVX2
  return bits<vf>(_mm256_sqrt_ps(bits<__m256>(x)));
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

SFD_INLINE vd sqrt(vd x) {
#if SFD_AVX512
  return bits<vd>(_mm512_sqrt_pd(bits<__m512d>(x)));
#elif SFD_AVX2
  return bits<vd>(_mm256_sqrt_pd(bits<__m256d>(x)));
#else
  for (int i = 0; i < W / 2; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// The greatest lane; a NaN lane may be passed over.
SFD_INLINE float greatest(vf v) {
#if SFD_AVX512
  return _mm512_reduce_max_ps(bits<__m512>(v));
#else
  float found = v[0];
  for (int i = 1; i < W; ++i) found = v[i] > found ? v[i] : found;
  return found;
#endif
}

// Lane by lane; b where a lane of a is NaN.
SFD_INLINE vf greater(vf a, vf b) {
#if SFD_AVX512
  return bits<vf>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b)));
#elif SFD_AVX2
  return bits<vf>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// Sum of the lanes, as a tree.
SFD_INLINE float sum(vf v) {
#if SFD_AVX512
  return _mm512_reduce_add_ps(bits<__m512>(v));
#elif SFD_AVX2
  const __m256 x = bits<__m256>(v);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

template <int U>
SFD_INLINE float sum(const vf (&parts)[U]) {
  vf total = parts[0];
  for (int k = 1; k < U; ++k) total += parts[k];
  return sum(total);
}

// (a, b) -> (b, a) for every pair of neighbouring lanes.
SFD_INLINE vf swap_pairs(vf x) {
#if SFD_AVX512
  return bits<vf>(_mm512_permute_ps(bits<__m512>(x), 0xb1));
#elif SFD_AVX2
  return bits<vf>(_mm256_permute_ps(bits<__m256>(x), 0xb1));
#else
  return vf{x[1], x[0], x[3], x[2]};
#endif
}

// Every second lane negated, beginning with the second.
SFD_INLINE vf alternate(vf x) { return bits<vf>(bits<vl>(x) ^ (vl{} + static_cast<int64_t>(0x8000000000000000ull))); }

// For every pair of rows Step apart: the block of Step x Step lanes above the diagonal and the one below change places.
template <int Step, int... Lane>
SFD_INLINE void exchange_blocks(vf (&rows)[W], std::integer_sequence<int, Lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if ((i & Step) != 0) continue;
    const vf a = rows[i], b = rows[i + Step];
#if defined(__clang__)
    rows[i] = __builtin_shufflevector(a, b, (Lane & Step ? W + Lane - Step : Lane)...);
    rows[i + Step] = __builtin_shufflevector(a, b, (Lane & Step ? W + Lane : Lane + Step)...);
#else
    rows[i] = __builtin_shuffle(a, b, vi{(Lane & Step ? W + Lane - Step : Lane)...});
    rows[i + Step] = __builtin_shuffle(a, b, vi{(Lane & Step ? W + Lane : Lane + Step)...});
#endif
  }
}

// W rows of W lanes: lane j of row i becomes lane i of row j.
SFD_INLINE void transpose(vf (&rows)[W]) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  exchange_blocks<1>(rows, lanes);
  exchange_blocks<2>(rows, lanes);
  if constexpr (W > 4) exchange_blocks<4>(rows, lanes);
  if constexpr (W > 8) exchange_blocks<8>(rows, lanes);
}

}  // namespace SFD_ISA
#endif  // SFD_ISA
}  // namespace sfd
