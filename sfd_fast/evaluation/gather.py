"""Rows and statistics of all ranks on rank 0; on one process everything passes through unchanged.

Shapes: N rows of this rank, F features.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sfd_fast.evaluation.statistics import RunningStatistics
from sfd_fast.ranks import Ranks


def _device() -> torch.device:
    """Where the backend can gather from: NCCL knows only CUDA tensors, gloo gathers only CPU tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def gather_rows(rows: Tensor) -> Tensor | None:
    """Rows (N, F) of all ranks, in rank order, on rank 0; None on the others. N may differ between ranks."""
    ranks = Ranks.of_group()
    if ranks.world_size == 1:
        return rows
    ranks.meet()
    sent = rows.to(_device())
    counts = torch.empty(ranks.world_size, dtype=torch.int64, device=sent.device)
    dist.all_gather(list(counts.split(1)), torch.tensor([len(rows)], device=sent.device))
    counts = counts.tolist()
    padded = sent.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(sent)] = sent
    received = [torch.empty_like(padded) for _ in counts] if ranks.first else None
    dist.gather(padded, received, dst=0)
    if received is None:
        return None
    return torch.cat([part[:count].to(rows.device) for part, count in zip(received, counts)])


def merge_statistics(statistics: RunningStatistics) -> RunningStatistics | None:
    """Statistics over the images of all ranks, merged in rank order (so the same every time), on rank 0; None on the
    others."""
    if Ranks.of_group().world_size == 1:
        return statistics
    num_features = statistics.mean.numel()
    count = torch.tensor([statistics.num_images], dtype=torch.float64, device=statistics.mean.device)
    packed = torch.cat([count, statistics.mean, statistics.scatter.flatten()])[None]
    received = gather_rows(packed)
    if received is None:
        return None
    merged = RunningStatistics(num_features, statistics.mean.device)
    for part in received:
        other = RunningStatistics(num_features, statistics.mean.device)
        other.num_images = int(part[0].item())
        other.mean, other.scatter = (
            part[1 : 1 + num_features],
            part[1 + num_features :].view(num_features, num_features),
        )
        merged.merge(other)
    return merged
