// The 2-norm of many tensors together. A task sums the squares of one piece of a tensor; pieces are added in order.
#include "kernel.h"

namespace sfd {
struct NormPiece {
  const void* data;
  Dtype dtype;
  i64 n;
};

struct TotalNormArgs {
  const NormPiece* pieces;
  double* sums;
};

inline constexpr i64 kPiece = 1 << 15;
}  // namespace sfd

SFD_KERNEL(total_norm_pieces, TotalNormArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// Four vectors of partial sums: a piece has 2^15 elements, so a lane adds 2^9 squares at most.
template <class T>
static double squares(const T* x, i64 n) {
  vf sums[4] = {};
  sweep<4>(n, [&](i64 i, auto lanes, int k) {
    prefetch(x + i + 512);
    const vf v = load(x + i, lanes);
    sums[k] += v * v;
  });
  return static_cast<double>(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

void total_norm_pieces(const TotalNormArgs& a, i64 begin, i64 end) {
  for (i64 index = begin; index < end; ++index) {
    const NormPiece& piece = a.pieces[index];
    with_type(piece.dtype,
              [&]<class T>(T*) { a.sums[index] = squares(static_cast<const T*>(piece.data), piece.n); });
  }
}

}  // namespace sfd::SFD_ISA
#else

#include <cmath>

namespace sfd {

static Tensor total_norm(std::vector<Tensor> tensors) {
  for (const Tensor& tensor : tensors)
    if (!is_kernel_dtype(tensor) || !tensor.is_contiguous()) return reference<Tensor>("total_norm", tensors);
  std::vector<NormPiece> pieces;
  for (const Tensor& tensor : tensors) {
    const i64 total = tensor.numel(), size = static_cast<i64>(tensor.element_size());
    for (i64 first = 0; first < total; first += kPiece)
      pieces.push_back({pointer<char>(tensor) + first * size, dtype_of(tensor), std::min(kPiece, total - first)});
  }
  std::vector<double> sums(pieces.size());
  run(total_norm_pieces, TotalNormArgs{pieces.data(), sums.data()}, static_cast<i64>(pieces.size()), 2);
  double total = 0;
  for (const double sum : sums) total += sum;
  const Tensor norm = fresh({}, ScalarType::Float);
  *output<float>(norm) = static_cast<float>(std::sqrt(total));
  return norm;
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) { m.impl("total_norm", TORCH_BOX(&sfd::total_norm)); }
#endif
