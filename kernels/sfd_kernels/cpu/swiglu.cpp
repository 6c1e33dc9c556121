// SwiGLU from the packed projection: y = SiLU(gate) * up, x = [gate | up].
#include "elementary.h"
#include "kernel.h"

namespace sfd {
struct SwigluArgs {
  Dtype dtype;
  const void *x, *dy;  // (rows, 2 hidden), (rows, hidden)
  void* out;           // y (rows, hidden), or dx (rows, 2 hidden)
  i64 hidden;
  bool stream;
};
}  // namespace sfd

SFD_KERNEL(swiglu_rows, SwigluArgs)
SFD_KERNEL(swiglu_backward_rows, SwigluArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

template <bool Stream, class T>
static void forward(const SwigluArgs& a, i64 begin, i64 end) {
  const i64 h = a.hidden;
  for (i64 row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * h;
    const T* up = gate + h;
    T* y = static_cast<T*>(a.out) + row * h;
    sweep(h, [&](i64 i, auto lanes) {
      prefetch(gate + 2 * h + i);
      prefetch(up + 2 * h + i);
      const vf g = load(gate + i, lanes);
      put<Stream>(y + i, times_sigmoid(g * load(up + i, lanes), g), lanes);
    });
  }
}

template <bool Stream, class T>
static void backward(const SwigluArgs& a, i64 begin, i64 end) {
  const i64 h = a.hidden;
  for (i64 row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * h;
    const T* up = gate + h;
    const T* dy = static_cast<const T*>(a.dy) + row * h;
    T* dgate = static_cast<T*>(a.out) + row * 2 * h;
    T* dup = dgate + h;
    sweep(h, [&](i64 i, auto lanes) {
      prefetch(gate + 2 * h + i);
      prefetch(up + 2 * h + i);
      prefetch(dy + h + i);
      const vf g = load(gate + i, lanes), d = load(dy + i, lanes);
      const vf s = sigmoid(g), ds = d * s;
      put<Stream>(dgate + i, ds * load(up + i, lanes) * (1.0f + g * (1.0f - s)), lanes);
      put<Stream>(dup + i, ds * g, lanes);
    });
  }
}

void swiglu_rows(const SwigluArgs& a, i64 begin, i64 end) {
  with_type(a.dtype, [&]<class T>(T*) {
    with_bool(a.stream, [&]<bool Stream>(Bool<Stream>) { forward<Stream, T>(a, begin, end); });
  });
  fence();
}

void swiglu_backward_rows(const SwigluArgs& a, i64 begin, i64 end) {
  with_type(a.dtype, [&]<class T>(T*) {
    with_bool(a.stream, [&]<bool Stream>(Bool<Stream>) { backward<Stream, T>(a, begin, end); });
  });
  fence();
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static Tensor swiglu(Tensor x) {
  const i64 dim = x.dim();
  if (dim < 1 || !is_kernel_dtype(x) || x.size(dim - 1) % 2 != 0) return reference<Tensor>("swiglu", x);
  const Tensor dense_x = dense(x);
  const i64 width = x.size(dim - 1), hidden = width / 2;
  std::vector<i64> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = hidden;
  const Tensor y = fresh(shape.data(), dim, x.scalar_type());
  const i64 rows = width == 0 ? 0 : x.numel() / width;
  run(swiglu_rows, SwigluArgs{dtype_of(x), pointer(dense_x), nullptr, output(y), hidden, should_stream(y, hidden)},
      rows, grain(hidden));
  return y;
}

static Tensor swiglu_backward(Tensor dy, Tensor x) {
  const i64 dim = x.dim();
  if (dim < 1 || !is_kernel_dtype(x) || !same_dtype(x, dy) || x.size(dim - 1) % 2 != 0 || dy.numel() * 2 != x.numel())
    return reference<Tensor>("swiglu_backward", dy, x);
  const Tensor dense_x = dense(x), dense_dy = dense(dy), dx = fresh_like(x);
  const i64 width = x.size(dim - 1), hidden = width / 2;
  const i64 rows = width == 0 ? 0 : x.numel() / width;
  run(swiglu_backward_rows,
      SwigluArgs{dtype_of(x), pointer(dense_x), pointer(dense_dy), output(dx), hidden, should_stream(dx, hidden)}, rows,
      grain(hidden));
  return dx;
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&sfd::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&sfd::swiglu_backward));
}
#endif
