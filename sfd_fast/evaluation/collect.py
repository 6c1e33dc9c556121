"""Features of one set of images, collected batch by batch on every rank and brought together on rank 0.

Shapes: B batch, N images, F features, H height, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sfd_fast.evaluation.features import FeatureExtractor
from sfd_fast.evaluation.gather import gather_rows, merge_statistics
from sfd_fast.evaluation.statistics import RunningStatistics


class Collected:
    """Features of one set of images: running statistics, and the pooled rows where a metric needs them."""

    def __init__(self, extractor: FeatureExtractor, device: torch.device, *, spatial: bool, num_kept: int | None):
        self.extractor = extractor
        self.num_kept = num_kept  # rows to keep, None: all
        self.pool = RunningStatistics(extractor.num_features, device)
        self.spatial = RunningStatistics(extractor.num_spatial_features, device) if spatial else None
        self.rows: list[Tensor] = []

    def update(self, images: Tensor) -> None:
        """Add uint8 images (B, H, W, 3)."""
        features = self.extractor(images.to(self.pool.mean.device))
        kept = self.pool.num_images if self.num_kept is None else min(self.pool.num_images, self.num_kept)
        self.pool.update(features.pool)
        if self.spatial is not None:
            self.spatial.update(features.spatial)
        room = len(features.pool) if self.num_kept is None else self.num_kept - kept
        if room > 0:
            self.rows.append(features.pool[:room].cpu())

    def gather(self) -> "Gathered | None":
        """Everything of all ranks, on rank 0; None on the others. Every rank must call it."""
        pool = merge_statistics(self.pool)
        spatial = merge_statistics(self.spatial) if self.spatial is not None else None
        rows = gather_rows(torch.cat(self.rows) if self.rows else torch.empty(0, self.extractor.num_features))
        return None if pool is None else Gathered(pool, spatial, rows)


@dataclass(frozen=True)
class Gathered:
    """Statistics of pooled and spatial features, and pooled rows (N, F) fp32 on the CPU (perhaps only the first
    ones)."""

    pool: RunningStatistics
    spatial: RunningStatistics | None
    rows: Tensor
