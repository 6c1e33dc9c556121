// Last stage of the norms' backward passes: partial sums of tasks to gradients of weight, shift, scale and gate.
#include "norm.h"

#ifdef SFD_ISA
namespace sfd::SFD_ISA {

// Tasks are blocks of columns.
void norm_reduce(const NormReduceArgs& a, i64 begin, i64 end) {
  alignas(64) float weight[kReduceColumns], scale[kReduceColumns], total[kReduceColumns], sums[kReduceColumns];
  for (i64 block = begin; block < end; ++block) {
    const i64 column = block * kReduceColumns;
    const i64 n = a.width - column < kReduceColumns ? a.width - column : kReduceColumns;
    const auto add_tasks = [&](const float* partial, i64 sample) {
      fill(sums, 0.0f, n);
      for (i64 task = sample * a.tasks_per_sample; task < (sample + 1) * a.tasks_per_sample; ++task) {
        const float* row = partial + task * a.width + column;
        sweep(n, [&](i64 i, auto lanes) { store(sums + i, load(sums + i, lanes) + load(row + i, lanes), lanes); });
      }
    };
    expand_row(weight, a.weight, 0, column, n);
    fill(total, 0.0f, n);
    for (i64 sample = 0; sample < a.batch; ++sample) {
      const i64 offset = sample * a.width + column;
      add_tasks(a.products, sample);
      expand_row(scale, a.scale, sample, column, n);
      sweep(n, [&](i64 i, auto lanes) {
        const vf products = load(sums + i, lanes);
        store(total + i, load(total + i, lanes) + (1.0f + load(scale + i, lanes)) * products, lanes);
        store(sums + i, load(weight + i, lanes) * products, lanes);
      });
      contract(at(a.dscale, a.dscale_dtype, offset), a.dscale_dtype, sums, n);
      add_tasks(a.shifts, sample);
      contract(at(a.dshift, a.dscale_dtype, offset), a.dscale_dtype, sums, n);
      if (a.gates != nullptr) {
        add_tasks(a.gates, sample);
        contract(at(a.dgate, a.dgate_dtype, offset), a.dgate_dtype, sums, n);
      }
    }
    contract(at(a.dweight, a.dweight_dtype, column), a.dweight_dtype, total, n);
  }
}

}  // namespace sfd::SFD_ISA
#endif
