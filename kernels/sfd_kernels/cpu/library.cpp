// What the kernels share at run time: the choice of instruction set and allocation.
#include <cstdlib>
#include <cstring>

#include "operator.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sfd {

static Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa isa() {
  static const Isa chosen = [] {
    const char* name = std::getenv("SFD_KERNELS_ISA");
    const Isa best = best_isa();
    if (name == nullptr || std::strcmp(name, "avx512") == 0) return best;
    if (std::strcmp(name, "avx2") == 0) return std::min(best, Isa::avx2);
    return std::strcmp(name, "baseline") == 0 ? Isa::baseline : best;
  }();
  return chosen;
}

static std::string capability() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "baseline"; }

Tensor fresh(const i64* sizes, i64 dim, ScalarType dtype) {
  i64 strides[8], count = 1;
  STD_TORCH_CHECK(dim <= 8, "at most 8 dimensions, not ", dim);
  for (i64 i = dim - 1; i >= 0; --i) {
    strides[i] = count;
    count *= std::max<i64>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // malloc maps a block of 32 MiB or more afresh at every call (the most that its threshold grows to), and each of its
  // 4 KiB pages then costs a fault: 1.6 us measured in a virtual machine, ten times the copy itself. Huge pages of 2
  // MiB cost a five-hundredth of the faults. The mapping, and the advice with it, ends with the tensor.
  const uint64_t bytes = static_cast<uint64_t>(count) * tensor.element_size();
  if (bytes >= (32u << 20)) {
    const uint64_t page = 2u << 20, start = reinterpret_cast<uint64_t>(tensor.data_ptr());
    const uint64_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

bool should_stream(const Tensor& out, i64 row) {
  // Twice a core's L2 cache. An ordinary store of a row first reads the line that it overwrites; measured on Zen 5,
  // fp32 width 1152, streaming makes the norm's backward 1.5 times as fast, in the L3 cache (14 MB moved) and beyond it.
  constexpr i64 limit = 2 << 20;
  const i64 element = static_cast<i64>(out.element_size());
  return out.numel() * element >= limit && row * element % 64 == 0 &&
         reinterpret_cast<uint64_t>(out.data_ptr()) % 64 == 0;
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_FRAGMENT(sfd_cpu, m) { m.def("capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(sfd_cpu, CompositeExplicitAutograd, m) { m.impl("capability", TORCH_BOX(&sfd::capability)); }
