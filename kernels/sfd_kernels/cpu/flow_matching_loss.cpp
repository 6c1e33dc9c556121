// Per sample, with v = x1 - x0: velocity = mean w_c (p - v)^2, cosine = mean over positions of 1 - cos(p, v) along
// channels.
//
// A task is a block of positions of one sample with all its channels: the sums along channels stay in the L1 cache, and
// the backward pass finds the block in the L2 cache when it comes to write.
#include "kernel.h"

namespace sfd {
struct FlowArgs {
  Dtype wide, narrow;                  // of x0 and x1; of pred and dpred
  const void *pred, *x0, *x1;          // (B, C, P)
  const float *d_velocity, *d_cosine;  // backward: (B,)
  void* dpred;
  float *velocity, *cosine;                           // forward: sums of a task's part
  i64 channels, positions, texture_channels, blocks;  // blocks of positions per sample
  float semantic_weight;
  bool stream;
};

inline constexpr i64 kPositions = 512;              // per task; their sums take 6 KiB
inline constexpr float kCosineEpsSquared = 1e-16f;  // a shorter vector has cosine 0 and no gradient
}  // namespace sfd

SFD_KERNEL(flow_loss_tasks, FlowArgs)
SFD_KERNEL(flow_loss_backward_tasks, FlowArgs)

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

struct Sums {  // along channels, per position
  alignas(64) float pp[kPositions], vv[kPositions], pv[kPositions];
};

SFD_INLINE vf inverse_norm(vf squared) { return squared > kCosineEpsSquared ? 1.0f / sqrt(squared) : vf{}; }

// Fills the sums of a block and returns its sum of w (p - v)^2. Fetches 4 KiB ahead: the hardware's prefetch ends at a
// page.
template <class Wide, class Narrow>
SFD_INLINE float accumulate(const FlowArgs& a, const Narrow* pred, const Wide* x0, const Wide* x1, i64 n, Sums& sums) {
  constexpr i64 ahead = 1024;
  vf velocity = {};
  fill(sums.pp, 0.0f, n);
  fill(sums.vv, 0.0f, n);
  fill(sums.pv, 0.0f, n);
  for (i64 c = 0; c < a.channels; ++c) {
    vf errors = {};
    sweep(n, [&](i64 i, auto lanes) {
      const i64 j = c * a.positions + i;
      prefetch(pred + j + ahead);
      prefetch(x0 + j + ahead);
      prefetch(x1 + j + ahead);
      const vf p = load(pred + j, lanes), v = load(x1 + j, lanes) - load(x0 + j, lanes), e = p - v;
      errors += e * e;
      store(sums.pp + i, load(sums.pp + i, lanes) + p * p, lanes);
      store(sums.vv + i, load(sums.vv + i, lanes) + v * v, lanes);
      store(sums.pv + i, load(sums.pv + i, lanes) + p * v, lanes);
    });
    velocity += errors * (c < a.texture_channels ? 1.0f : a.semantic_weight);
  }
  return sum(velocity);
}

template <class Wide, class Narrow>
static void forward(const FlowArgs& a, i64 begin, i64 end) {
  Sums sums;
  for (i64 task = begin; task < end; ++task) {
    const i64 first = task % a.blocks * kPositions;
    const i64 n = a.positions - first < kPositions ? a.positions - first : kPositions;
    const i64 offset = task / a.blocks * a.channels * a.positions + first;
    a.velocity[task] =
        accumulate(a, static_cast<const Narrow*>(a.pred) + offset, static_cast<const Wide*>(a.x0) + offset,
                   static_cast<const Wide*>(a.x1) + offset, n, sums);
    vf cosine = {};
    sweep(n, [&](i64 i, auto lanes) {
      cosine +=
          load(sums.pv + i, lanes) * inverse_norm(load(sums.pp + i, lanes)) * inverse_norm(load(sums.vv + i, lanes));
    });
    a.cosine[task] = static_cast<float>(n) - sum(cosine);
  }
}

// dpred = 2 d_velocity w (p - v) / (C P) - d_cosine (v / (|p| |v|) - cos p / |p|^2) / P, gathered as p and v times a
// factor.
template <bool Stream, class Wide, class Narrow>
static void backward(const FlowArgs& a, i64 begin, i64 end) {
  Sums sums;
  for (i64 task = begin; task < end; ++task) {
    const i64 sample = task / a.blocks, first = task % a.blocks * kPositions;
    const i64 n = a.positions - first < kPositions ? a.positions - first : kPositions;
    const i64 offset = sample * a.channels * a.positions + first;
    const Narrow* pred = static_cast<const Narrow*>(a.pred) + offset;
    const Wide *x0 = static_cast<const Wide*>(a.x0) + offset, *x1 = static_cast<const Wide*>(a.x1) + offset;
    Narrow* dpred = static_cast<Narrow*>(a.dpred) + offset;
    accumulate(a, pred, x0, x1, n, sums);
    const float d_cosine = a.d_cosine[sample] / static_cast<float>(a.positions);
    const float d_velocity = 2.0f * a.d_velocity[sample] / static_cast<float>(a.channels * a.positions);
    sweep(n, [&](i64 i, auto lanes) {
      const vf ip = inverse_norm(load(sums.pp + i, lanes)), iv = inverse_norm(load(sums.vv + i, lanes));
      const vf cosine = load(sums.pv + i, lanes) * ip * iv;
      store(sums.pp + i, d_cosine * cosine * ip * ip, lanes);
      store(sums.vv + i, -d_cosine * ip * iv, lanes);
    });
    for (i64 c = 0; c < a.channels; ++c) {
      const float weight = d_velocity * (c < a.texture_channels ? 1.0f : a.semantic_weight);
      sweep(n, [&](i64 i, auto lanes) {
        const i64 j = c * a.positions + i;
        const vf p = load(pred + j, lanes), v = load(x1 + j, lanes) - load(x0 + j, lanes);
        put<Stream>(dpred + j, weight * (p - v) + (load(sums.pp + i, lanes) * p + load(sums.vv + i, lanes) * v), lanes);
      });
    }
  }
}

void flow_loss_tasks(const FlowArgs& a, i64 begin, i64 end) {
  with_mix(a.wide, a.narrow, [&]<class Wide, class Narrow>(Wide*, Narrow*) { forward<Wide, Narrow>(a, begin, end); });
}

void flow_loss_backward_tasks(const FlowArgs& a, i64 begin, i64 end) {
  with_mix(a.wide, a.narrow, [&]<class Wide, class Narrow>(Wide*, Narrow*) {
    with_bool(a.stream, [&]<bool Stream>(Bool<Stream>) { backward<Stream, Wide, Narrow>(a, begin, end); });
  });
  fence();
}

}  // namespace sfd::SFD_ISA
#else
namespace sfd {

static bool is_supported(const Tensor& pred, const Tensor& x0, const Tensor& x1) {
  return pred.dim() == 4 && is_mix(x0, pred) && same_dtype(x0, x1) && same_shape(pred, x0) && same_shape(pred, x1) &&
         pred.size(1) > 0 && pred.size(2) * pred.size(3) > 0;
}

static FlowArgs arguments(const Tensor& pred, const Tensor& x0, const Tensor& x1, i64 texture_channels, double weight) {
  FlowArgs args{};
  args.wide = dtype_of(x0), args.narrow = dtype_of(pred);
  args.pred = pointer(pred), args.x0 = pointer(x0), args.x1 = pointer(x1);
  args.channels = pred.size(1), args.positions = pred.size(2) * pred.size(3), args.texture_channels = texture_channels;
  args.blocks = ceil_div(args.positions, kPositions);
  args.semantic_weight = static_cast<float>(weight);
  return args;
}

static std::tuple<Tensor, Tensor> flow_matching_loss(Tensor pred, Tensor x0, Tensor x1, i64 num_texture_channels,
                                                     double semantic_weight) {
  if (!is_supported(pred, x0, x1))
    return reference<std::tuple<Tensor, Tensor> >("flow_matching_loss", pred, x0, x1, num_texture_channels,
                                                  semantic_weight);
  pred = dense(pred), x0 = dense(x0), x1 = dense(x1);
  FlowArgs args = arguments(pred, x0, x1, num_texture_channels, semantic_weight);
  const i64 batch = pred.size(0), tasks = batch * args.blocks;
  std::vector<float> sums(2 * tasks);
  args.velocity = sums.data(), args.cosine = sums.data() + tasks;
  run(flow_loss_tasks, args, tasks, grain(3 * args.channels * std::min(args.positions, kPositions)));
  return {sample_means(args.velocity, batch, args.blocks, args.channels * args.positions),
          sample_means(args.cosine, batch, args.blocks, args.positions)};
}

static Tensor flow_matching_loss_backward(Tensor d_velocity, Tensor d_cosine, Tensor pred, Tensor x0, Tensor x1,
                                          i64 num_texture_channels, double semantic_weight) {
  if (!is_supported(pred, x0, x1) || !is_float(d_velocity) || !is_float(d_cosine) ||
      !has_shape(d_velocity, {pred.size(0)}) || !has_shape(d_cosine, {pred.size(0)}))
    return reference<Tensor>("flow_matching_loss_backward", d_velocity, d_cosine, pred, x0, x1, num_texture_channels,
                             semantic_weight);
  pred = dense(pred), x0 = dense(x0), x1 = dense(x1), d_velocity = dense(d_velocity), d_cosine = dense(d_cosine);
  const Tensor dpred = fresh_like(pred);
  FlowArgs args = arguments(pred, x0, x1, num_texture_channels, semantic_weight);
  args.d_velocity = pointer<float>(d_velocity), args.d_cosine = pointer<float>(d_cosine);
  args.dpred = output(dpred);
  args.stream = should_stream(dpred, args.positions);
  run(flow_loss_backward_tasks, args, pred.size(0) * args.blocks,
      grain(4 * args.channels * std::min(args.positions, kPositions)));
  return dpred;
}

}  // namespace sfd

STABLE_TORCH_LIBRARY_IMPL(sfd, CPU, m) {
  m.impl("flow_matching_loss", TORCH_BOX(&sfd::flow_matching_loss));
  m.impl("flow_matching_loss_backward", TORCH_BOX(&sfd::flow_matching_loss_backward));
}
#endif
