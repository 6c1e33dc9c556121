// The operators' side of a kernel file: tensors, allocation, threads, and the way back to the reference.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "vec.h"

namespace sfd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- instruction set ----

enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };  // each holds those before it
inline constexpr int kIsas = 5;

Isa isa();  // the best of this machine, or a lesser one that SFD_KERNELS_ISA names

template <class Args>
struct Kernel {
  using Function = void (*)(const Args&, i64, i64);
  std::array<Function, kIsas> of;
  Function get() const { return of[static_cast<size_t>(isa())]; }
};

// Runs tasks 0 to count - 1 on torch's threads, `grain` of them at least on each.
template <class Args>
void run(const Kernel<Args>& kernel, const Args& args, i64 count, i64 grain) {
  if (count <= 0) return;
  const auto function = kernel.get();
  if (count <= grain) {
    function(args, 0, count);
  } else {
    torch::stable::parallel_for(0, count, grain, [&](i64 begin, i64 end) { function(args, begin, end); });
  }
}

// Tasks per thread that are worth waking one, if a task moves `elements` elements.
inline i64 grain(i64 elements) { return std::max<i64>(1, 32768 / std::max<i64>(1, elements)); }

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// ---- tensors ----

inline bool is_kernel_dtype(const Tensor& t) {
  const auto type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline Dtype dtype_of(const Tensor& t) {
  const auto type = t.scalar_type();
  return type == ScalarType::Float ? Dtype::f32 : type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}

inline bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float; }
inline bool same_dtype(const Tensor& a, const Tensor& b) { return a.scalar_type() == b.scalar_type(); }

// The pairs for which kernels of two dtypes are compiled: see with_mix in types.h.
inline bool is_mix(const Tensor& wide, const Tensor& narrow) {
  return is_kernel_dtype(wide) && is_kernel_dtype(narrow) && (same_dtype(wide, narrow) || is_float(wide));
}

inline bool has_shape(const Tensor& t, std::initializer_list<i64> shape) {
  const auto sizes = t.sizes();
  return sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// The tensor itself, or a contiguous copy: expanded gradients and odd strides are rare and not worth a kernel.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// (B, D) whose rows may lie apart, as slices of one packed tensor do.
inline Tensor dense_rows(const Tensor& t) {
  return t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

template <class T = void>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T = void>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Uninitialised and contiguous.
Tensor fresh(const i64* sizes, i64 dim, ScalarType dtype);
inline Tensor fresh(std::initializer_list<i64> sizes, ScalarType dtype) {
  return fresh(sizes.begin(), static_cast<i64>(sizes.size()), dtype);
}
inline Tensor fresh_like(const Tensor& t) { return fresh(t.sizes().data(), t.dim(), t.scalar_type()); }

// Runs tasks as above, with `bytes` of scratch memory for each thread in args.scratch.
template <class Args>
void run(const Kernel<Args>& kernel, Args args, i64 count, i64 grain, i64 bytes) {
  const auto part = [&, function = kernel.get()](i64 begin, i64 end) {
    const Tensor memory = fresh({bytes}, ScalarType::Byte);
    Args own = args;
    own.scratch = output<char>(memory);
    function(own, begin, end);
  };
  if (count <= 0) return;
  if (count <= grain) {
    part(0, count);
  } else {
    torch::stable::parallel_for(0, count, grain, part);
  }
}

// Rows of the kernels that keep whole rows on the stack; wider ones go to the reference.
inline constexpr i64 kMaxWidth = 8192;

// Whether an output is too large to wait in a cache for its reader, and its rows are aligned as streaming stores want
// it.
bool should_stream(const Tensor& out, i64 row);

// (B,) floats: sums over the tasks of each sample, in order, divided by `count`.
inline Tensor sample_means(const float* sums, i64 batch, i64 tasks, i64 count) {
  const Tensor means = fresh({batch}, ScalarType::Float);
  for (i64 sample = 0; sample < batch; ++sample) {
    double total = 0;
    for (i64 task = sample * tasks; task < (sample + 1) * tasks; ++task) total += sums[task];
    output<float>(means)[sample] = static_cast<float>(total / static_cast<double>(count));
  }
  return means;
}

// ---- the reference ----

template <class R>
struct Unpack {
  static R from(StableIValue* stack) { return torch::stable::detail::to<R>(stack[0]); }
};
template <>
struct Unpack<void> {
  static void from(StableIValue*) {}
};
template <class... T>
struct Unpack<std::tuple<T...>> {
  template <size_t... I>
  static std::tuple<T...> from(StableIValue* stack, std::index_sequence<I...>) {
    return {torch::stable::detail::to<T>(stack[I])...};
  }
  static std::tuple<T...> from(StableIValue* stack) { return from(stack, std::index_sequence_for<T...>{}); }
};

// sfd_reference::NAME of the same arguments: for dtypes and shapes that a kernel leaves out.
template <class R, class... A>
R reference(const char* name, const A&... args) {
  StableIValue stack[sizeof...(A) + 8] = {torch::stable::detail::from(args)...};
  const std::string qualified = std::string("sfd_reference::") + name;
  // The stable interface tells only that there was an error; registry.py knows these words and asks for its text.
  if (torch_call_dispatcher(qualified.c_str(), "", stack, TORCH_ABI_VERSION) != TORCH_SUCCESS)
    throw std::runtime_error(qualified + " raised an error for these arguments; sfd_kernels." + name + " tells which");
  return Unpack<R>::from(stack);
}

}  // namespace sfd
