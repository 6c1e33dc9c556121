// x_t = (1 - t) x0 + t x1, with t the texture clock for the first channels and the semantic clock for the others.
#include "kernel.h"

namespace sfd {
struct NoiseArgs {
  Dtype dtype;
  const void *x1, *x0;
  const float *t_tex, *t_sem;
  void* out;
  i64 size, texture_size;  // elements of a sample, and of its texture channels
  bool stream;
};
}  // namespace sfd

SFD_KERNEL(noise_latents_samples, NoiseArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

template <bool Stream, class T>
static void forward(const NoiseArgs& a, i64 begin, i64 end) {
  for (i64 sample = begin; sample < end; ++sample) {
    const auto interpolate = [&](i64 first, i64 n, float t) {
      const T* x1 = static_cast<const T*>(a.x1) + sample * a.size + first;
      const T* x0 = static_cast<const T*>(a.x0) + sample * a.size + first;
      T* out = static_cast<T*>(a.out) + sample * a.size + first;
      sweep(n, [&](i64 i, auto lanes) {
        prefetch(x1 + i + 1024);
        prefetch(x0 + i + 1024);
        put<Stream>(out + i, (1.0f - t) * load(x0 + i, lanes) + t * load(x1 + i, lanes), lanes);
      });
    };
    interpolate(0, a.texture_size, a.t_tex[sample]);
    interpolate(a.texture_size, a.size - a.texture_size, a.t_sem[sample]);
  }
}

void noise_latents_samples(const NoiseArgs& a, i64 begin, i64 end) {
  with_type(a.dtype, [&]<class T>(T*) {
    with_bool(a.stream, [&]<bool Stream>(Bool<Stream>) { forward<Stream, T>(a, begin, end); });
  });
  fence();
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static Tensor noise_latents(Tensor x1, Tensor x0, Tensor t_tex, Tensor t_sem, i64 num_texture_channels) {
  const bool supported = x1.dim() == 4 && is_kernel_dtype(x1) && same_dtype(x1, x0) && same_shape(x1, x0) &&
                         is_float(t_tex) && is_float(t_sem) && has_shape(t_tex, {x1.size(0)}) &&
                         has_shape(t_sem, {x1.size(0)});
  if (!supported) return reference<Tensor>("noise_latents", x1, x0, t_tex, t_sem, num_texture_channels);
  x1 = dense(x1), x0 = dense(x0), t_tex = dense(t_tex), t_sem = dense(t_sem);
  const Tensor out = fresh_like(x1);
  const i64 plane = x1.size(2) * x1.size(3), channels = x1.size(1);
  const i64 texture = std::clamp<i64>(num_texture_channels, 0, channels);
  const NoiseArgs args{dtype_of(x1), pointer(x1),      pointer(x0),     pointer<float>(t_tex),    pointer<float>(t_sem),
                       output(out),  channels * plane, texture * plane, should_stream(out, plane)};
  run(noise_latents_samples, args, x1.size(0), grain(3 * channels * plane));
  return out;
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) { m.impl("noise_latents", TORCH_BOX(&sfd::noise_latents)); }
#endif
