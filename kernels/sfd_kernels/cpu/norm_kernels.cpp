// The kernels of norm.h.
#include "norm.h"

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// to = the sample's row as floats, or zeros if there is none.
SFD_INLINE void expand_row(float* to, const Rows& rows, i64 sample, i64 offset, i64 n) {
  if (rows.data == nullptr) return fill(to, 0.0f, n);
  expand(to, at(rows.data, rows.dtype, sample * rows.stride + offset), rows.dtype, n);
}

// to = weight (1 + scale) of a sample.
SFD_INLINE void modulation_gain(float* to, const NormArgs& a, i64 sample) {
  SFD_SCRATCH(weights, a.width);
  expand_row(weights, a.weight, sample, 0, a.width);
  expand_row(to, a.scale, sample, 0, a.width);
  sweep(a.width, [&](i64 i, auto lanes) {
    store(to + i, load(weights + i, lanes) * (1.0f + load(to + i, lanes)), lanes);
  });
}

SFD_INLINE float rstd_of(float sum_of_squares, i64 n, float eps) {
  return 1.0f / __builtin_sqrtf(sum_of_squares / static_cast<float>(n) + eps);
}

SFD_INLINE void add(float* to, vf v, auto lanes) { store(to, load(to, lanes) + v, lanes); }

// x as it will be read back: rounded to its dtype.
template <class T>
SFD_INLINE vf rounded(vf v, const T* type) {
  return widen(narrow(v, type), type);
}
SFD_INLINE vf rounded(vf v, const float*) { return v; }

// start(task, sample), then visit(offset of a row) for the rows of every task.
template <class Start, class Visit>
SFD_INLINE void for_rows(const NormArgs& a, i64 begin, i64 end, Start&& start, Visit&& visit) {
  for (i64 task = begin; task < end; ++task) {
    const i64 sample = task / a.tasks_per_sample, first = task % a.tasks_per_sample * kRowsPerTask;
    const i64 last = first + kRowsPerTask < a.tokens ? first + kRowsPerTask : a.tokens;
    start(task, sample);
    for (i64 row = sample * a.tokens + first; row < sample * a.tokens + last; ++row) visit(row * a.width);
  }
}

template <bool Gated, bool Stream, class Wide, class Narrow>
static void forward(const NormArgs& a, i64 begin, i64 end) {
  const i64 d = a.width;
  SFD_SCRATCH(gain, d);
  SFD_SCRATCH(bias, d);
  SFD_SCRATCH(gate, Gated ? d : 0);
  SFD_SCRATCH(kept, Gated ? d : 0);
  const auto start = [&](i64, i64 sample) {
    modulation_gain(gain, a, sample);
    expand_row(bias, a.shift, sample, 0, d);
    if constexpr (Gated) expand_row(gate, a.gate, sample, 0, d);
  };
  for_rows(a, begin, end, start, [&](i64 row) {
    const Wide* x = static_cast<const Wide*>(a.x) + row;
    const Narrow* branch = static_cast<const Narrow*>(a.branch) + row;
    Wide* x_new = static_cast<Wide*>(a.x_new) + row;
    Narrow* y = static_cast<Narrow*>(a.y) + row;
    vf squares[4] = {};
    sweep<4>(d, [&](i64 i, auto lanes, int k) {
      vf v = load(x + i, lanes);
      if constexpr (Gated) {
        prefetch(x + d + i);
        v = rounded(v + load(gate + i, lanes) * load(branch + i, lanes), x);
        put<Stream>(x_new + i, v, lanes);
        store(kept + i, v, lanes);
      }
      squares[k] += v * v;
    });
    const float rstd = rstd_of(sum(squares), d, a.eps);
    sweep(d, [&](i64 i, auto lanes) {
      vf v;
      if constexpr (Gated) {
        prefetch(branch + d + i);
        v = load(kept + i, lanes);
      } else {
        prefetch(x + d + i);
        v = load(x + i, lanes);
      }
      put<Stream>(y + i, v * rstd * load(gain + i, lanes) + load(bias + i, lanes), lanes);
    });
  });
}

// One pass over a row for its two sums, one for dx and the column sums; the second finds the row in the L1 cache. Each
// fetches a part of the next row's streams: spread over both, the loads in flight limit neither.
template <bool Gated, bool Stream, class Wide, class Narrow>
static void backward(const NormArgs& a, i64 begin, i64 end) {
  const i64 d = a.width;
  float *products = nullptr, *shifts = nullptr, *gates = nullptr;
  SFD_SCRATCH(gain, d);
  SFD_SCRATCH(gate, Gated ? d : 0);
  const auto start = [&](i64 task, i64 sample) {
    products = a.products + task * d, shifts = a.shifts + task * d;
    modulation_gain(gain, a, sample);
    fill(products, 0.0f, d);
    fill(shifts, 0.0f, d);
    if constexpr (Gated) {
      gates = a.gates + task * d;
      expand_row(gate, a.gate, sample, 0, d);
      fill(gates, 0.0f, d);
    }
  };
  for_rows(a, begin, end, start, [&](i64 row) {
    const Wide* x = static_cast<const Wide*>(a.x) + row;
    const Wide* dx_new = static_cast<const Wide*>(a.dx_new) + row;
    const Narrow* branch = static_cast<const Narrow*>(a.branch) + row;
    const Narrow* dy = static_cast<const Narrow*>(a.dy) + row;
    Wide* dx = static_cast<Wide*>(a.dx) + row;
    Narrow* dbranch = static_cast<Narrow*>(a.dbranch) + row;
    vf squares[4] = {}, inner[4] = {};
    sweep<4>(d, [&](i64 i, auto lanes, int k) {
      prefetch(x + d + i);
      if constexpr (Gated) prefetch(dy + d + i);
      const vf v = load(x + i, lanes);
      squares[k] += v * v;
      inner[k] += load(dy + i, lanes) * load(gain + i, lanes) * v;
    });
    const float rstd = rstd_of(sum(squares), d, a.eps);
    const float mean = sum(inner) * rstd / static_cast<float>(d);
    sweep(d, [&](i64 i, auto lanes) {
      const vf x_hat = load(x + i, lanes) * rstd, grad = load(dy + i, lanes);
      vf total = rstd * (grad * load(gain + i, lanes) - x_hat * mean);
      if constexpr (Gated) {
        prefetch(dx_new + d + i);
        prefetch(branch + d + i);
        total += load(dx_new + i, lanes);
        put<Stream>(dbranch + i, load(gate + i, lanes) * total, lanes);
        add(gates + i, load(branch + i, lanes) * total, lanes);
      } else {
        prefetch(dy + d + i);
      }
      put<Stream>(dx + i, total, lanes);
      add(products + i, grad * x_hat, lanes);
      add(shifts + i, grad, lanes);
    });
  });
}

// f(gated tag, stream tag, wide, narrow)
template <class F>
SFD_INLINE void with_variant(const NormArgs& a, F&& f) {
  with_mix(a.wide, a.narrow, [&](auto* wide, auto* narrow) {
    with_bool(a.branch != nullptr,
              [&](auto gated) { with_bool(a.stream, [&](auto stream) { f(gated, stream, wide, narrow); }); });
  });
  fence();
}

void norm_tasks(const NormArgs& a, i64 begin, i64 end) {
  with_variant(a, [&]<bool Gated, bool Stream, class Wide, class Narrow>(Bool<Gated>, Bool<Stream>, Wide*, Narrow*) {
    forward<Gated, Stream, Wide, Narrow>(a, begin, end);
  });
}

void norm_backward_tasks(const NormArgs& a, i64 begin, i64 end) {
  with_variant(a, [&]<bool Gated, bool Stream, class Wide, class Narrow>(Bool<Gated>, Bool<Stream>, Wide*, Narrow*) {
    backward<Gated, Stream, Wide, Narrow>(a, begin, end);
  });
}

// Partial sums of tasks to gradients of weight, shift, scale and gate. Tasks are blocks of columns.
void norm_reduce(const NormReduceArgs& r, i64 begin, i64 end) {
  const NormArgs& a = *r.norm;
  alignas(64) float weight[kReduceColumns], scale[kReduceColumns], total[kReduceColumns], sums[kReduceColumns];
  for (i64 block = begin; block < end; ++block) {
    const i64 column = block * kReduceColumns;
    const i64 n = a.width - column < kReduceColumns ? a.width - column : kReduceColumns;
    const auto add_tasks = [&](const float* partial, i64 sample) {
      fill(sums, 0.0f, n);
      for (i64 task = sample * a.tasks_per_sample; task < (sample + 1) * a.tasks_per_sample; ++task) {
        const float* row = partial + task * a.width + column;
        sweep(n, [&](i64 i, auto lanes) { add(sums + i, load(row + i, lanes), lanes); });
      }
    };
    const auto write = [&](void* to, Dtype dtype, i64 offset, const float* from) {
      contract(at(to, dtype, offset), dtype, from, n);
    };
    expand_row(weight, a.weight, 0, column, n);
    fill(total, 0.0f, n);
    for (i64 sample = 0; sample < r.batch; ++sample) {
      const i64 offset = sample * a.width + column;
      add_tasks(a.products, sample);
      expand_row(scale, a.scale, sample, column, n);
      sweep(n, [&](i64 i, auto lanes) {
        const vf products = load(sums + i, lanes);
        add(total + i, (1.0f + load(scale + i, lanes)) * products, lanes);
        store(sums + i, load(weight + i, lanes) * products, lanes);
      });
      write(r.dscale, a.scale.dtype, offset, sums);
      add_tasks(a.shifts, sample);
      write(r.dshift, a.scale.dtype, offset, sums);
      if (a.branch == nullptr) continue;
      add_tasks(a.gates, sample);
      write(r.dgate, a.gate.dtype, offset, sums);
    }
    write(r.dweight, a.weight.dtype, column, total);
  }
}

}  // namespace sfd::SFD_ISA
#endif
