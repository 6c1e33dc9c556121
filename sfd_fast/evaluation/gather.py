"""Rows and statistics of all ranks on rank 0; on one process everything passes through unchanged.

Shapes: N rows of this rank, F features.
"""

import pickle

import torch
import torch.distributed as dist
from torch import Tensor

from sfd_fast.evaluation.statistics import RunningStatistics


def ranks() -> tuple[int, int]:
    """(rank, world size) of the initialised process group, (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(num_items: int) -> tuple[int, int]:
    """This rank's contiguous part [start, stop) of num_items; parts in rank order give all items in order."""
    rank, world_size = ranks()
    return num_items * rank // world_size, num_items * (rank + 1) // world_size


def _device() -> torch.device:
    """Where the backend can gather from: NCCL knows only CUDA tensors, gloo gathers only CPU tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def gather_rows(rows: Tensor) -> Tensor | None:
    """Rows (N, F) of all ranks, in rank order, on rank 0; None on the others. N may differ between ranks."""
    rank, world_size = ranks()
    if world_size == 1:
        return rows
    sent = rows.to(_device())
    counts = torch.empty(world_size, dtype=torch.int64, device=sent.device)
    dist.all_gather(list(counts.split(1)), torch.tensor([len(rows)], device=sent.device))
    counts = counts.tolist()
    padded = sent.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(sent)] = sent
    received = [torch.empty_like(padded) for _ in counts] if rank == 0 else None
    dist.gather(padded, received, dst=0)
    if received is None:
        return None
    return torch.cat([part[:count].to(rows.device) for part, count in zip(received, counts)])


def merge_statistics(statistics: RunningStatistics) -> RunningStatistics | None:
    """Statistics over the images of all ranks, merged in rank order (so the same every time), on rank 0; None on the
    others."""
    rank, world_size = ranks()
    if world_size == 1:
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


def on_rank_zero(function):
    """function() on rank 0, its result on all ranks; an exception too, so that no rank waits for one that gave up."""
    rank, world_size = ranks()
    if world_size == 1:
        return function()
    sent: list[object] = [None, None]
    failure = None
    if rank == 0:
        try:
            sent = [function(), None]
        except Exception as error:
            failure, sent = error, [None, portable(error)]
    dist.broadcast_object_list(sent, src=0)
    if sent[1] is not None:
        raise failure or sent[1]
    return sent[0]


def portable(error: Exception) -> Exception:
    """The exception as other processes can unpickle it: its own kind where that is possible."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever its kind's own code raises
        pass
    return RuntimeError(f"{type(error).__name__} on rank 0: {error}")
