// Element types chosen at run time, and rows of any of them as floats.
#pragma once

#include "vec.h"

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// Run-time choices made compile-time ones: f gets a null pointer of each element type, or a Bool.
template <bool B>
struct Bool {
  static constexpr bool value = B;
};

template <class F>
SFD_INLINE void with_bool(bool b, F&& f) {
  if (b) {
    f(Bool<true>{});
  } else {
    f(Bool<false>{});
  }
}

template <class F>
SFD_INLINE void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<BF16*>(nullptr));
    case Dtype::f16:
      return f(static_cast<F16*>(nullptr));
  }
}

// (wide, narrow): equal, or float and a 16-bit type: see is_mix in operator.h.
template <class F>
SFD_INLINE void with_mix(Dtype wide, Dtype narrow, F&& f) {
  with_type(narrow, [&]<class Narrow>(Narrow* n) {
    if (wide == narrow) {
      f(n, n);
    } else {
      f(static_cast<float*>(nullptr), n);
    }
  });
}

// n elements of any type as floats.
SFD_INLINE void expand(float* to, const void* from, Dtype dtype, i64 n) {
  with_type(dtype, [&]<class T>(T*) {
    sweep(n, [&](i64 i, auto lanes) { store(to + i, load(static_cast<const T*>(from) + i, lanes), lanes); });
  });
}

// The way back.
SFD_INLINE void contract(void* to, Dtype dtype, const float* from, i64 n) {
  with_type(dtype, [&]<class T>(T*) {
    sweep(n, [&](i64 i, auto lanes) { store(static_cast<T*>(to) + i, load(from + i, lanes), lanes); });
  });
}

SFD_INLINE i64 size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Element i of an array of a dtype.
SFD_INLINE const void* at(const void* data, Dtype dtype, i64 i) {
  return static_cast<const char*>(data) + i * size_of(dtype);
}
SFD_INLINE void* at(void* data, Dtype dtype, i64 i) { return static_cast<char*>(data) + i * size_of(dtype); }

SFD_INLINE void fill(float* to, float value, i64 n) {
  sweep(n, [&](i64 i, auto lanes) { store(to + i, splat(value), lanes); });
}

// Uninitialised floats on the stack, aligned to the vector; n is limited by the operator.
#define SFD_SCRATCH(name, n)              \
  float* name = reinterpret_cast<float*>( \
      (reinterpret_cast<uintptr_t>(__builtin_alloca((n) * sizeof(float) + 64)) + 63) & ~uintptr_t(63))

}  // namespace sfd::SFD_ISA
#endif
