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

#ifdef SFD_ISA
#define SFD_KERNEL(name, Args)                                \
  namespace sfd::SFD_ISA {                                    \
  void name(const Args& a, ::sfd::i64 begin, ::sfd::i64 end); \
  }
#else
#include "operator.h"
#if defined(__x86_64__)
#define SFD_KERNEL(name, Args)                                        \
  namespace sfd::baseline {                                           \
  void name(const Args& a, ::sfd::i64 begin, ::sfd::i64 end);         \
  }                                                                   \
  namespace sfd::avx2 {                                               \
  void name(const Args& a, ::sfd::i64 begin, ::sfd::i64 end);         \
  }                                                                   \
  namespace sfd::avx512 {                                             \
  void name(const Args& a, ::sfd::i64 begin, ::sfd::i64 end);         \
  }                                                                   \
  namespace sfd {                                                     \
  inline Kernel<Args> name{avx512::name, avx2::name, baseline::name}; \
  }
#else
#define SFD_KERNEL(name, Args)                                              \
  namespace sfd::baseline {                                                 \
  void name(const Args& a, ::sfd::i64 begin, ::sfd::i64 end);               \
  }                                                                         \
  namespace sfd {                                                           \
  inline Kernel<Args> name{baseline::name, baseline::name, baseline::name}; \
  }
#endif
#endif
