// Counter-based random numbers: Philox4x32-10 words and standard normals by Box-Muller in double.
//
// Source of the generator: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11).
#include "elementary.h"
#include "kernel.h"

namespace sfd {
struct PhiloxArgs {
  const i64* ids;
  void* out;  // (B, count): int64 words, or float normals
  uint64_t seed;
  uint32_t stream;
  i64 count, tasks_per_sample;
};

inline constexpr i64 kBlocksPerTask = 1024;  // of four words
}  // namespace sfd

SFD_KERNEL(philox_bits_tasks, PhiloxArgs)
SFD_KERNEL(philox_normal_tasks, PhiloxArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

typedef uint64_t vlu __attribute__((vector_size(W * 4)));  // W / 2 lanes

struct Words {
  vu w[4];
};

// Low and high half of the 64-bit products of all lanes with m.
SFD_INLINE void multiply(vu a, uint32_t m, vu& low, vu& high) {
#if SFD_AVX512
  const __m512i x = bits<__m512i>(a), k = _mm512_set1_epi64(m);
  const __m512i even = _mm512_mul_epu32(x, k), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), k);
  low = bits<vu>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
  high = bits<vu>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
#elif SFD_AVX2
  const __m256i x = bits<__m256i>(a), k = _mm256_set1_epi64x(m);
  const __m256i even = _mm256_mul_epu32(x, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), k);
  low = bits<vu>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
  high = bits<vu>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
#else
  for (int i = 0; i < W; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * m;
    low[i] = static_cast<uint32_t>(product);
    high[i] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

// Blocks `block` to `block + W - 1` of a sample, one per lane.
SFD_INLINE Words philox(const PhiloxArgs& a, uint64_t id, uint32_t block) {
  vu c0, c1 = a.stream - vu{}, c2 = static_cast<uint32_t>(id) - vu{}, c3 = static_cast<uint32_t>(id >> 32) - vu{};
  for (int i = 0; i < W; ++i) c0[i] = block + static_cast<uint32_t>(i);
  uint32_t k0 = static_cast<uint32_t>(a.seed), k1 = static_cast<uint32_t>(a.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    vu low0, high0, low1, high1;
    multiply(c0, 0xD2511F53u, low0, high0);
    multiply(c2, 0xCD9E8D57u, low1, high1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// cos and sin of 2 pi v for v in [0, 1]: 4 v = q + f with f in [-1/2, 1/2] exactly.
SFD_INLINE void cos_sin_turns(vd v, vd& cosine, vd& sine) {
  const vd t = 4.0 * v, shifted = t + kRound;
  cos_sin((t - (shifted - kRound)) * 1.5707963267948966192, bits<vl>(shifted), cosine, sine);
}

SFD_INLINE vd uniform(vu_half words) { return (__builtin_convertvector(words, vd) + 0.5) * 0x1p-32; }

// Two words of every block to two normals.
SFD_INLINE void box_muller(vu a, vu b, vf& first, vf& second) {
  struct Halves {
    vu_half h[2];
  };
  struct Results {
    vf_half h[2];
  };
  const Halves as = bits<Halves>(a), bs = bits<Halves>(b);
  Results firsts, seconds;
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    vd cosine, sine;
    const vd radius = sqrt(-2.0 * log(uniform(as.h[k])));
    cos_sin_turns(uniform(bs.h[k]), cosine, sine);
    firsts.h[k] = __builtin_convertvector(radius * cosine, vf_half);
    seconds.h[k] = __builtin_convertvector(radius * sine, vf_half);
  }
  first = bits<vf>(firsts);
  second = bits<vf>(seconds);
}

// Lane j of w[0] to w[3] becomes elements 4 j to 4 j + 3 of the result.
SFD_INLINE Words interleave(const Words& words) {
  Words out;
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    vi pick, merge;
    for (int i = 0; i < W; ++i) {
      const int lane = part * (W / 4) + i / 4;
      pick[i] = i % 2 == 0 ? lane : W + lane;  // w[0], w[1] or w[2], w[3] in turn
      merge[i] = i % 4 < 2 ? i : W + i;
    }
    const vu front = __builtin_shuffle(words.w[0], words.w[1], pick);
    const vu back = __builtin_shuffle(words.w[2], words.w[3], pick);
    out.w[part] = __builtin_shuffle(front, back, merge);
  }
  return out;
}

// Calls put(position in the sample, four vectors of words or normals, number of them that count).
template <class F>
SFD_INLINE void for_blocks(const PhiloxArgs& a, i64 begin, i64 end, F&& put) {
  const i64 blocks = (a.count + 3) / 4;
  for (i64 task = begin; task < end; ++task) {
    const i64 sample = task / a.tasks_per_sample, first = task % a.tasks_per_sample * kBlocksPerTask;
    const i64 last = first + kBlocksPerTask < blocks ? first + kBlocksPerTask : blocks;
    for (i64 block = first; block < last; block += W) {
      const i64 left = a.count - 4 * block;
      put(sample * a.count + 4 * block, philox(a, static_cast<uint64_t>(a.ids[sample]), static_cast<uint32_t>(block)),
          left < 4 * W ? left : 4 * W);
    }
  }
}

void philox_bits_tasks(const PhiloxArgs& a, i64 begin, i64 end) {
  for_blocks(a, begin, end, [&](i64 position, const Words& words, i64 n) {
    struct Halves {
      vu_half h[8];
    };
    alignas(64) i64 buffer[4 * W];
    i64* out = static_cast<i64*>(a.out) + position;
    i64* to = n == 4 * W ? out : buffer;
    const Halves halves = bits<Halves>(interleave(words));
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const vlu wide = __builtin_convertvector(halves.h[k], vlu);
      __builtin_memcpy(to + k * (W / 2), &wide, sizeof wide);
    }
    if (to == buffer) std::memcpy(out, buffer, n * sizeof(i64));
  });
}

void philox_normal_tasks(const PhiloxArgs& a, i64 begin, i64 end) {
  for_blocks(a, begin, end, [&](i64 position, const Words& words, i64 n) {
    alignas(64) float buffer[4 * W];
    float* out = static_cast<float*>(a.out) + position;
    float* to = n == 4 * W ? out : buffer;
    vf normal[4];
    box_muller(words.w[0], words.w[1], normal[0], normal[1]);
    box_muller(words.w[2], words.w[3], normal[2], normal[3]);
    const Words mixed =
        interleave({{bits<vu>(normal[0]), bits<vu>(normal[1]), bits<vu>(normal[2]), bits<vu>(normal[3])}});
    __builtin_memcpy(to, &mixed, sizeof mixed);
    if (to == buffer) std::memcpy(out, buffer, n * sizeof(float));
  });
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static Tensor generate(const char* name, const Kernel<PhiloxArgs>& kernel, ScalarType dtype, Tensor ids, i64 seed,
                       i64 stream, i64 count) {
  if (ids.dim() != 1 || ids.scalar_type() != ScalarType::Long || count < 0 || count > (i64{1} << 34))
    return reference<Tensor>(name, ids, seed, stream, count);
  ids = dense(ids);
  const Tensor out = fresh({ids.size(0), count}, dtype);
  const i64 tasks = ceil_div(ceil_div(count, 4), kBlocksPerTask);
  const PhiloxArgs args{
      pointer<i64>(ids), output(out), static_cast<uint64_t>(seed), static_cast<uint32_t>(stream), count, tasks};
  run(kernel, args, ids.size(0) * tasks, grain(16 * std::min(count, 4 * kBlocksPerTask)));
  return out;
}

static Tensor philox_bits(Tensor sample_ids, i64 seed, i64 stream, i64 count) {
  return generate("philox_bits", philox_bits_tasks, ScalarType::Long, sample_ids, seed, stream, count);
}

static Tensor philox_normal(Tensor sample_ids, i64 seed, i64 stream, i64 count) {
  return generate("philox_normal", philox_normal_tasks, ScalarType::Float, sample_ids, seed, stream, count);
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) {
  m.impl("philox_bits", TORCH_BOX(&sfd::philox_bits));
  m.impl("philox_normal", TORCH_BOX(&sfd::philox_normal));
}
#endif
