// How a kernel file is laid out: arguments, kernels (compiled once per instruction set), operator (compiled once).
//
//   struct SwigluArgs { ... };                       // pointers and sizes, no tensors
//   SFD_KERNEL(swiglu_forward, SwigluArgs)           // declares the kernel for every instruction set
//   #ifdef SFD_ISA
//   namespace sfd::SFD_ISA {
//   void swiglu_forward(const SwigluArgs& a, i64 begin, i64 end) { ... }   // tasks begin to end - 1
//   }
//   #else
//   ... the operator: checks, allocates, calls run(swiglu_forward, args, tasks, grain) ...
//   #endif
//
// A task's result depends on nothing but its arguments, and sums over tasks are taken in a fixed order: the same bits
// come out whatever the number of threads.
#pragma once

#include "types.h"

#define SFD_DECLARE(isa, name, Args)                          \
  namespace sfd::isa {                                        \
  void name(const Args& a, ::sfd::i64 begin, ::sfd::i64 end); \
  }

// SFD_BF16_KERNEL declares two: `name` for every dtype, and `name_bf16` for bf16 tensors, which is compiled for
// avx512_bf16 and amx besides. Its file is named in CMakeLists.txt.
#ifdef SFD_ISA
#define SFD_KERNEL(name, Args) SFD_DECLARE(SFD_ISA, name, Args)
#define SFD_BF16_KERNEL(name, Args) SFD_DECLARE(SFD_ISA, name, Args)
#else
#include "operator.h"
#if defined(__x86_64__)
#define SFD_KERNEL(name, Args)                                                                      \
  SFD_DECLARE(baseline, name, Args)                                                                 \
  SFD_DECLARE(avx2, name, Args)                                                                     \
  SFD_DECLARE(avx512, name, Args)                                                                   \
  namespace sfd {                                                                                   \
  inline Kernel<Args> name{{baseline::name, avx2::name, avx512::name, avx512::name, avx512::name}}; \
  }
#else
#define SFD_KERNEL(name, Args)                                                                                \
  SFD_DECLARE(baseline, name, Args)                                                                           \
  namespace sfd {                                                                                             \
  inline Kernel<Args> name{{baseline::name, baseline::name, baseline::name, baseline::name, baseline::name}}; \
  }
#endif
#if defined(SFD_HAS_BF16_ISAS)
#define SFD_BF16_KERNEL(name, Args)                                                                          \
  SFD_KERNEL(name, Args)                                                                                     \
  SFD_DECLARE(avx512_bf16, name, Args)                                                                       \
  SFD_DECLARE(amx, name, Args)                                                                               \
  namespace sfd {                                                                                            \
  inline Kernel<Args> name##_bf16{{baseline::name, avx2::name, avx512::name, avx512_bf16::name, amx::name}}; \
  }
#else
#define SFD_BF16_KERNEL(name, Args)         \
  SFD_KERNEL(name, Args)                    \
  namespace sfd {                           \
  inline Kernel<Args> name##_bf16{name.of}; \
  }
#endif
#endif
