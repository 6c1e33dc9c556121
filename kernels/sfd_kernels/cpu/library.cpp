// What the kernels share at run time: the choice of instruction set and allocation.
#include <cstdlib>
#include <cstring>

#include "operator.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sfd {

static constexpr const char* kIsaNames[kIsas] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(SFD_HAS_BF16_ISAS)
static bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
}

// The tiles' registers are 8 KiB, for which a process must ask the system once.
static bool has_amx() {
#if defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & bf16) == 0 || (edx & tiles) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

static Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if defined(SFD_HAS_BF16_ISAS)
    // Without tiles, Intel's bf16 dot product is no gain: it runs at half the rate of a product and sum in fp32
    // (measured on Sapphire Rapids), so that both multiply as fast. AMD's runs at the full rate (by its tables; not
    // measured).
    if (has_avx512_bf16() && has_amx()) return Isa::amx;
    if (has_avx512_bf16() && !__builtin_cpu_is("intel")) return Isa::avx512_bf16;
#endif
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa isa() {
  static const Isa chosen = [] {
    const char* name = std::getenv("SFD_KERNELS_ISA");
    const Isa best = best_isa();
    for (int i = 0; name != nullptr && i < kIsas; ++i)
      if (std::strcmp(name, kIsaNames[i]) == 0) return std::min(best, static_cast<Isa>(i));
    return best;
  }();
  return chosen;
}

static std::string capability() { return kIsaNames[static_cast<int>(isa())]; }

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
  // fp32 width 1152, streaming makes the norm's backward 1.5 times as fast, in the L3 cache (14 MB moved) and beyond
  // it.
  constexpr i64 limit = 2 << 20;
  const i64 element = static_cast<i64>(out.element_size());
  return out.numel() * element >= limit && row * element % 64 == 0 &&
         reinterpret_cast<uint64_t>(out.data_ptr()) % 64 == 0;
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_FRAGMENT(sfd_cpu, m) { m.def("capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(sfd_cpu, CompositeExplicitAutograd, m) { m.impl("capability", TORCH_BOX(&sfd::capability)); }
