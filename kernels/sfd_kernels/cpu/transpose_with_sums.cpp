// A 16-bit matrix transposed, and the sums of its columns in fp32.
//
// A task is a band of columns over all rows, wide as long as two threads find work: rows may be a page apart, and each
// page is looked up once a band. It goes through blocks of 2 W rows and W columns: two rows become one row of 32-bit
// pairs, W of these a square that is transposed in registers, and a line of 2 W elements goes to each of W rows of the
// result.
#include "kernel.h"

namespace sfd {
struct TransposeArgs {
  Dtype dtype;
  const void* x;  // (rows, columns), rows `stride` elements apart
  void *out, *sums;  // (columns, rows), (columns,)
  i64 rows, columns, stride, band;
  bool stream;
};

inline constexpr i64 kBand = 512;  // at most
}  // namespace sfd

SFD_KERNEL(transpose_bands, TransposeArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// Rows row to row + 2 W - 1 of W columns from `column` on; their sums are added to `sum`. The rows after them are far
// apart in memory, where no hardware looks ahead.
template <bool Stream, class T>
SFD_INLINE void whole_block(const TransposeArgs& a, i64 row, i64 column, vf& sum) {
  const T* x = static_cast<const T*>(a.x) + row * a.stride + column;
  vf pairs[W], total = {};
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    const T* even = x + 2 * i * a.stride;
    prefetch_far(even + 2 * W * a.stride);
    prefetch_far(even + (2 * W + 1) * a.stride);
    const vh low = load_raw<vh>(even), high = load_raw<vh>(even + a.stride);
    total += widen(low, even) + widen(high, even);
    pairs[i] = bits<vf>(__builtin_convertvector(low, vu) | (__builtin_convertvector(high, vu) << 16));
  }
  transpose(pairs);
  uint16_t* out = static_cast<uint16_t*>(a.out) + column * a.rows + row;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) put<Stream>(reinterpret_cast<float*>(out + i * a.rows), pairs[i], Full{});
  sum += total;
}

// The same of any part of the matrix, element by element.
template <class T>
static void part(const TransposeArgs& a, i64 first_row, i64 last_row, i64 column, float* sum) {
  const uint16_t* x = static_cast<const uint16_t*>(a.x);
  uint16_t* out = static_cast<uint16_t*>(a.out) + column * a.rows;
  for (i64 row = first_row; row < last_row; ++row) {
    const uint16_t* p = x + row * a.stride + column;
    *sum += load(reinterpret_cast<const T*>(p), Part{1})[0];
    out[row] = *p;
  }
}

template <bool Stream, class T>
static void band(const TransposeArgs& a, i64 first, i64 last) {
  float sums[kBand] = {};
  const i64 whole_rows = a.rows / (2 * W) * (2 * W), whole_columns = first + (last - first) / W * W;
  for (i64 row = 0; row < whole_rows; row += 2 * W) {
    for (i64 column = first; column < whole_columns; column += W) {
      vf sum = load(sums + column - first, Full{});
      whole_block<Stream, T>(a, row, column, sum);
      store(sums + column - first, sum, Full{});
    }
  }
  for (i64 column = first; column < last; ++column)
    part<T>(a, column < whole_columns ? whole_rows : 0, a.rows, column, sums + column - first);
  contract(static_cast<T*>(a.sums) + first, a.dtype, sums, last - first);
}

void transpose_bands(const TransposeArgs& a, i64 begin, i64 end) {
  for (i64 task = begin; task < end; ++task) {
    const i64 first = task * a.band, next = first + a.band;
    const i64 last = next < a.columns ? next : a.columns;
    with_bool(a.stream, [&]<bool Stream>(Bool<Stream>) {
      if (a.dtype == Dtype::bf16) {
        band<Stream, BF16>(a, first, last);
      } else {
        band<Stream, F16>(a, first, last);
      }
    });
  }
  fence();
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

using TwoTensors = std::tuple<Tensor, Tensor>;

static TwoTensors transpose_with_sums(Tensor x) {
  if (x.dim() != 2 || !is_kernel_dtype(x) || is_float(x)) return reference<TwoTensors>("transpose_with_sums", x);
  const Tensor rows = dense_rows(x);
  const i64 count = x.size(0), columns = x.size(1);
  const Tensor out = fresh({columns, count}, x.scalar_type()), sums = fresh({columns}, x.scalar_type());
  const i64 band = std::min(kBand, ceil_div(columns, 64) * 32);  // half of the columns, in whole lines
  run(transpose_bands,
      TransposeArgs{dtype_of(x), pointer(rows), output(out), output(sums), count, columns, rows.stride(0), band,
                    should_stream(out, count)},
      band == 0 ? 0 : ceil_div(columns, band), grain(band * count));
  return {out, sums};
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) { m.impl("transpose_with_sums", TORCH_BOX(&sfd::transpose_with_sums)); }
#endif
