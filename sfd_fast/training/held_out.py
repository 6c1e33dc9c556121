"""Mean loss over held-out samples, whatever is trained: at fixed noise and times, shared equally by all ranks.

Letters: B batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfd_fast.training.engines.interface import Batch, Engine, Objective

VALIDATION_IDS = 2**40
"""first sample id of held-out data: no position of a run comes near it, so its noise and times are its own and fixed"""


def held_out_means(
    engine: Engine,
    names: Sequence[str],
    num_samples: int,
    global_batch_size: int,
    batch_of: Callable[[Tensor], Batch],
    objective: Objective,
) -> dict[str, float]:
    """{"loss": sum of the terms, name: mean of that term} over all samples; the same on every rank.

    batch_of: numbers of samples (B,) int64 -> their batch. Samples that fill up the last batch do not count.
    """
    size = max(1, min(global_batch_size // engine.world_size, num_samples))
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=engine.device)
    stride = size * engine.world_size
    for start in range(engine.rank * size, -(-num_samples // stride) * stride, stride):
        ids = torch.arange(start, start + size)
        terms = engine.evaluate(batch_of(ids % num_samples), objective)
        counts = (ids < num_samples).to(engine.device)
        sums += torch.stack([*((terms[name] * counts).sum() for name in names), counts.sum()]).double()
    *totals, count = engine.sum_over_ranks(sums).tolist()
    means = {name: total / count for name, total in zip(names, totals)}
    return {"loss": sum(means.values())} | means
