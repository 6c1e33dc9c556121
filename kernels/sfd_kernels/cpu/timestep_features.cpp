// [cos(t f_i), sin(t f_i)] with f_i = exp(-ln(10000) i / (F / 2)), the angles in double.
#include "elementary.h"
#include "kernel.h"

#include <type_traits>

namespace sfd {
struct TimestepArgs {
  const float* t;
  const double* frequencies;
  float* out;  // (count, 2 half)
  i64 half;
};
}  // namespace sfd

SFD_KERNEL(timestep_features_rows, TimestepArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// n <= W / 2 angles; Count is an i64, or a number that the compiler knows.
template <class Count>
SFD_INLINE void some(double t, const double* frequencies, float* cosines, float* sines, Count n) {
  vd angle = {}, cosine, sine;
  std::memcpy(&angle, frequencies, n * sizeof(double));
  angle *= t;
  const vd shifted = angle * 0.63661977236758134308 + kRound, q = shifted - kRound;
  const vd r = (angle - q * 1.5707963267341256141) - q * 6.0771005065061922e-11;  // pi / 2 in 33 bits and the rest
  cos_sin(r, bits<vl>(shifted), cosine, sine);
  const vf_half c = __builtin_convertvector(cosine, vf_half), s = __builtin_convertvector(sine, vf_half);
  std::memcpy(cosines, &c, n * sizeof(float));
  std::memcpy(sines, &s, n * sizeof(float));
}

void timestep_features_rows(const TimestepArgs& a, i64 begin, i64 end) {
  constexpr std::integral_constant<i64, W / 2> lanes;
  for (i64 row = begin; row < end; ++row) {
    const double t = a.t[row];
    float* cosines = a.out + row * 2 * a.half;
    float* sines = cosines + a.half;
    i64 i = 0;
    // The reduction is exact enough for angles of a few thousand; no frequency is above 1.
    if (t > -4096.0 && t < 4096.0) {
      for (; i + lanes <= a.half; i += lanes) some(t, a.frequencies + i, cosines + i, sines + i, lanes);
      some(t, a.frequencies + i, cosines + i, sines + i, a.half - i);
      continue;
    }
    for (; i < a.half; ++i) {
      cosines[i] = static_cast<float>(__builtin_cos(t * a.frequencies[i]));
      sines[i] = static_cast<float>(__builtin_sin(t * a.frequencies[i]));
    }
  }
}

}  // namespace sfd::SFD_ISA
#else

#include <cmath>

namespace sfd {

static Tensor timestep_features(Tensor t, i64 num_features) {
  if (!is_float(t) || num_features < 0 || num_features % 2 != 0 || t.dim() > 6)
    return reference<Tensor>("timestep_features", t, num_features);
  t = dense(t);
  std::vector<i64> shape(t.sizes().begin(), t.sizes().end());
  shape.push_back(num_features);
  const Tensor out = fresh(shape.data(), static_cast<i64>(shape.size()), ScalarType::Float);
  const i64 half = num_features / 2;
  std::vector<double> frequencies(half);
  for (i64 i = 0; i < half; ++i)
    frequencies[i] = std::exp(-std::log(10000.0) * static_cast<double>(i) / static_cast<double>(half));
  const TimestepArgs args{pointer<float>(t), frequencies.data(), output<float>(out), half};
  run(timestep_features_rows, args, t.numel(), grain(16 * num_features));
  return out;
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) { m.impl("timestep_features", TORCH_BOX(&sfd::timestep_features)); }
#endif
