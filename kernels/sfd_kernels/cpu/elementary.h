// Elementary functions on vectors.
#pragma once

#include "vec.h"

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// e^x to about 1 ulp, infinite where it overflows; near the smallest normal numbers it stays at 2.4e-38. NaN stays NaN.
// Cody-Waite reduction by n ln 2, then twice the degree-6 minimax polynomial of Cephes expf, times 2^(n - 1): so n =
// 128 needs no exponent that fp32 does not have.
SFD_INLINE vf exp(vf x) {
  x = at_most(at_least(x, -86.6f), 89.0f);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const vf shifted = x * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = ((p * r) * r + r) * 2.0f + 2.0f;  // twice e^r, rounded as e^r is
  const vf half_power = bits<vf>((bits<vi>(shifted) << 23) + 0x3f000000);
  return p * half_power;
}

// 2^x for x < 128; below -126 it goes to 0 or stays at 1.2e-38. NaN stays NaN. 2 to the fraction, in [0, 1], is the
// minimax polynomial of that degree that is 1 at 0: its relative error is at most 8.3e-8 (degree 5), or 2.9e-6 (degree
// 4), enough for what is rounded to 16 bits.
template <int Degree = 5>
SFD_INLINE vf exp2(vf x) {
  static_assert(Degree == 4 || Degree == 5);
  constexpr float five[] = {1.86713017e-3f, 9.01702978e-3f, 5.57999127e-2f, 2.40164444e-1f, 6.93151295e-1f};
  constexpr float four[] = {1.34266848e-2f, 5.22424728e-2f, 2.41280198e-1f, 6.93044841e-1f};
#if SFD_AVX512
  constexpr int floor = 1;  // x less its floor; scalef then multiplies with 2 to the floor of x
  const vf r = bits<vf>(_mm512_reduce_ps(bits<__m512>(x), floor));
#else
  const float magic = 12582912.0f;  // as in exp
  x = at_least(x, -126.0f);
  const vf shifted = (x - 0.5f) + magic;
  const vf r = x - (shifted - magic);
#endif
  vf p = splat(Degree == 5 ? five[0] : four[0]);
#pragma GCC unroll 4
  for (int i = 1; i < Degree; ++i) p = p * r + (Degree == 5 ? five[i] : four[i % 4]);
  p = p * r + 1.0f;
#if SFD_AVX512
  return bits<vf>(_mm512_scalef_ps(bits<__m512>(p), bits<__m512>(x)));
#else
  return bits<vf>(bits<vi>(p) + (bits<vi>(shifted) << 23));
#endif
}

SFD_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
// numerator sigmoid(x); with numerator = x it is SiLU(x): NaN of -inf, as torch
SFD_INLINE vf times_sigmoid(vf numerator, vf x) { return numerator / (1.0f + exp(-x)); }

// cos and sin of r + q pi / 2 for |r| <= pi / 4, as Taylor series in double: relative error about 1e-14.
SFD_INLINE void cos_sin(vd r, vl q, vd& cosine, vd& sine) {
  const vd z = r * r;
  vd s = splat_d(-1.0 / 1307674368000.0);
  s = s * z + 1.0 / 6227020800.0;
  s = s * z - 1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  s = r + r * z * s;
  vd c = splat_d(1.0 / 20922789888000.0);
  c = c * z - 1.0 / 87178291200.0;
  c = c * z + 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  c = 1.0 + z * c;
  const vl odd = -(q & 1);  // all ones in odd quadrants, where sine and cosine change places
  const vl cs = bits<vl>(c), sn = bits<vl>(s);
  cosine = bits<vd>(((cs & ~odd) | (sn & odd)) ^ (((q + 1) & 2) << 62));
  sine = bits<vd>(((sn & ~odd) | (cs & odd)) ^ ((q & 2) << 62));
}

inline constexpr double kRound =
    6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, kept in the low bits

// ln(u) for normal u > 0: u = 2^e m with m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh((m - 1) / (m + 1)) as its series;
// the relative error is about 1e-15, also next to 1, where m - 1 is exact.
SFD_INLINE vd log(vd u) {
  const vl k = bits<vl>(u) - 0x3fe6a09e667f3bcdLL;
  const vl e = k >> 52;
  const vd m = bits<vd>(bits<vl>(u) - (e << 52));
  const vd exponent = bits<vd>(e + 0x4338000000000000LL) - kRound;  // integer to double
  const vd s = (m - 1.0) / (m + 1.0), z = s * s;
  vd p = splat_d(2.0 / 19);
  p = p * z + 2.0 / 17;
  p = p * z + 2.0 / 15;
  p = p * z + 2.0 / 13;
  p = p * z + 2.0 / 11;
  p = p * z + 2.0 / 9;
  p = p * z + 2.0 / 7;
  p = p * z + 2.0 / 5;
  p = p * z + 2.0 / 3;
  return exponent * 0.6931471805599453094 + (2.0 * s + s * z * p);
}

// The same, rounded to a float; not a number for infinity and NaN.
SFD_INLINE vf log(vf u) {
  struct Halves {
    vf_half part[2];
  } halves = bits<Halves>(u);
  for (vf_half& half : halves.part) half = __builtin_convertvector(log(__builtin_convertvector(half, vd)), vf_half);
  return bits<vf>(halves) + (u - u);
}

}  // namespace sfd::SFD_ISA
#endif
