"""Compares generated images with a reference: images in, all metrics out; for `sfd evaluate` and during training.

Shapes: B batch, N reference images, M samples, F features, H height, W width.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sfd_fast.config.evaluation import EvaluatorConfig, Metric
from sfd_fast.evaluation.collect import Collected
from sfd_fast.evaluation.features import build_extractor, check_images, full_precision
from sfd_fast.evaluation.images import ImageSet, open_images, read_ahead
from sfd_fast.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from sfd_fast.evaluation.statistics import Statistics, StoredStatistics, is_saved, load_statistics, save_statistics
from sfd_fast.files.overwrite import require_free
from sfd_fast.ranks import Ranks

METRICS = get_args(Metric)
NEED_REFERENCE_IMAGES = ("precision", "recall", "kid")


class Evaluator:
    """Metrics of generated images against one reference, which is read once.

        evaluator = Evaluator(EvaluatorConfig(reference="imagenet256.npz"))
        evaluator.update(images)        # uint8 (B, H, W, 3), as often as you like, on every rank its own images
        metrics = evaluator.compute()   # collective; the same dict on every rank
        evaluator.reset()               # for the next checkpoint

    Raises ValueError for whatever the reference, its statistics or the weights lack. `skipped` tells which metrics are
    left out and why, `warnings` what makes the figures incomparable, `record` where everything came from.
    """

    def __init__(self, config: EvaluatorConfig, *, on_batch: Callable[[], None] = lambda: None):
        """on_batch is called after every batch of reference images: reading them may take minutes."""
        self.config, self.on_batch = config, on_batch
        auto = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if config.device == "auto" else config.device)
        if config.save_statistics:
            check = partial(require_free, config.save_statistics, is_saved, overwrite=config.overwrite)
            Ranks.of_group().on_first(check)
        stored, images = _open_reference(config)
        self.extractor = build_extractor(config.features, config.weights, device=self.device)
        if stored is not None:
            self._check_widths(stored)
        self.record = {
            "features": config.features,
            "weights": self.extractor.source,
            "reference": {
                "path": config.reference,
                "statistics": "stored in the file" if stored else "computed from its images",
            },
        }
        self.wanted, self.skipped = self._select(stored, images)
        self.warnings: list[str] = []
        self.reference_size = (images.height, images.width) if images else None
        self.num_reference_images: int | None = None
        self.reference_statistics: dict[str, Statistics] = {}  # "fid" and "sfid"; on rank 0
        self.reference_rows = torch.empty(0, self.extractor.num_features)
        self._read_reference(stored, images)
        self.reset()

    def _check_widths(self, stored: StoredStatistics) -> None:
        widths = {"mu": (stored.pool, self.extractor.num_features)}
        if stored.spatial is not None and self.extractor.num_spatial_features:
            widths["mu_s"] = (stored.spatial, self.extractor.num_spatial_features)
        for name, (statistics, width) in widths.items():
            if statistics.mean.numel() != width:
                raise ValueError(
                    f"{self.config.reference}: {name} has {statistics.mean.numel()} values, but {self.config.features} "
                    f"features are {width}: the statistics were made with other features"
                )

    def _select(self, stored: StoredStatistics | None, images: ImageSet | None) -> tuple[list[str], dict[str, str]]:
        """Metrics to compute, and why the others are not. Raises ValueError where one was asked for by name."""
        reasons = {}
        if not self.extractor.num_spatial_features:
            reasons["sfid"] = f"{self.config.features} features have no spatial part"
        elif stored and stored.spatial is None:
            reasons["sfid"] = "the reference statistics have no mu_s and sigma_s"
        if not self.extractor.has_logits:
            reasons["inception_score"] = f"{self.config.features} features have no class scores"
        if images is None:
            reasons |= dict.fromkeys(NEED_REFERENCE_IMAGES, "the reference has statistics but no images (arr_0)")
        for name in self.config.metrics:
            if name in reasons:
                raise ValueError(f"{name} cannot be computed: {reasons[name]}")
        wanted = [name for name in METRICS if name not in reasons and name in (self.config.metrics or METRICS)]
        return wanted, {} if self.config.metrics else reasons

    def _read_reference(self, stored: StoredStatistics | None, images: ImageSet | None) -> None:
        """Statistics from the file where it has them, else from the images; rows from the images where a metric needs
        them."""
        config = self.config
        needs_rows = any(name in self.wanted for name in NEED_REFERENCE_IMAGES)
        gathered = None
        if images is not None and (stored is None or needs_rows):
            self.record["reference"] |= images.describe()
            stop = images.num_images if stored is None else min(images.num_images, config.num_reference)
            num_kept = max(0, config.num_reference - Ranks.of_group().share(stop).start) if needs_rows else 0
            spatial = stored is None and self.extractor.num_spatial_features > 0
            collected = Collected(self.extractor, self.device, spatial=spatial, num_kept=num_kept)
            self.feed(images, collected.update, stop=stop, label="reference")
            gathered = collected.gather()

        def finish() -> None:
            pool = stored.pool if stored else gathered.pool.result()
            spatial = stored.spatial if stored else gathered.spatial and gathered.spatial.result()
            self.num_reference_images = pool.num_images
            self.reference_statistics = {"fid": pool, "sfid": spatial}
            if gathered:
                self.reference_rows = gathered.rows
            if config.save_statistics:
                save_statistics(config.save_statistics, config.features, pool, spatial)

        Ranks.of_group().on_first(finish)

    def feed(self, images: ImageSet, update: Callable[[Tensor], None], *, label: str, stop: int | None = None) -> None:
        """Give this rank's share of images to `update`, with a progress bar on rank 0."""
        ranks = Ranks.of_group()
        mine = ranks.share(images.num_images if stop is None else stop)
        bar = tqdm(
            total=len(mine),
            desc=f"{label}: {self.config.features} features",
            unit="img",
            disable=not self.config.progress or not ranks.first,
        )
        with bar:
            for batch in read_ahead(images.batches(self.config.batch_size, mine.start, mine.stop)):
                update(torch.from_numpy(batch.copy()))  # a copy: what the file gave is read-only
                self.on_batch()
                bar.update(len(batch))

    def reset(self) -> None:
        """Forget the samples; the reference stays."""
        needs_rows = any(name in self.wanted for name in (*NEED_REFERENCE_IMAGES, "inception_score"))
        num_kept = None if needs_rows else 0
        self.samples = Collected(self.extractor, self.device, spatial="sfid" in self.wanted, num_kept=num_kept)

    def update(self, images: Tensor) -> None:
        """Add generated images. images: uint8 (B, H, W, 3), any device. Raises ValueError for another dtype, shape or
        size."""
        check_images(images)
        size = tuple(images.shape[1:3])
        if self.reference_size and size != self.reference_size and not self.config.allow_size_mismatch:
            raise ValueError(
                f"samples are {size[0]} x {size[1]}, the reference {self.reference_size[0]} x {self.reference_size[1]} "
                "(height x width): resize one side, or give --allow_size_mismatch to compare all the same"
            )
        self.samples.update(images)

    def compute(self) -> dict[str, float]:
        """All wanted metrics of the images since the last reset, over all ranks, the same dict on each.

        fid (fd_dinov2, fd_digits with those features), sfid, inception_score and _std, precision, recall, kid and _std.
        Fills `skipped` and `warnings`. Raises ValueError for too few images.
        """
        gathered = self.samples.gather()
        results, skipped, self.warnings = Ranks.of_group().on_first(lambda: self._compute(gathered))
        self.skipped = self.skipped | skipped
        return results

    def _compute(self, samples) -> tuple[dict[str, float], dict[str, str], list[str]]:
        config = self.config
        kind = config.features
        names = {} if kind == "inception" else {"fid": f"fd_{kind}", "kid": f"kd_{kind}"}
        results: dict[str, float] = {}
        skipped: dict[str, str] = {}

        def record(name: str, value: float, deviation: float | None = None) -> None:
            results[names.get(name, name)] = value
            if deviation is not None:
                results[names.get(name, name) + "_std"] = deviation

        def enough(name: str, needed: int) -> bool:
            given = min(len(samples.rows), len(self.reference_rows))
            if given >= needed:
                return True
            skipped[name] = f"it needs {needed} images on both sides; the smaller has {given}"
            if name in config.metrics:
                raise ValueError(f"{name} cannot be computed: {skipped[name]}")
            return False

        with torch.inference_mode(), full_precision(self.device):
            pool = samples.pool.result()
            rows, reference_rows = samples.rows.to(self.device), self.reference_rows.to(self.device)
            if "fid" in self.wanted:
                record("fid", frechet_distance(pool, self.reference_statistics["fid"]))
            if "sfid" in self.wanted:
                record("sfid", frechet_distance(samples.spatial.result(), self.reference_statistics["sfid"]))
            if "inception_score" in self.wanted:
                logits = torch.cat([self.extractor.logits(part) for part in rows.split(512)])
                record("inception_score", *inception_score(logits, split_size=config.split_size))
            both = [name for name in ("precision", "recall") if name in self.wanted]
            possible = [enough(name, config.num_neighbors + 1) for name in both]
            if both and all(possible):
                rounding = config.distance_precision
                if rounding == "auto":
                    rounding = "float16" if kind == "inception" else "float32"
                settings = {"num_neighbors": config.num_neighbors, "precision": rounding}
                precision, recall = precision_recall(reference_rows, rows, **settings)
                for name in both:
                    record(name, precision if name == "precision" else recall)
            if "kid" in self.wanted and enough("kid", config.kid_subset_size):
                settings = {"num_subsets": config.kid_num_subsets, "subset_size": config.kid_subset_size}
                record("kid", *kernel_distance(reference_rows, rows, seed=config.seed, **settings))
        return results, skipped, self._warnings(samples.pool.num_images)

    def _warnings(self, num_samples: int) -> list[str]:
        """What makes the figures incomparable with published ones."""
        warnings = []
        if self.extractor.source.get("published") is False:
            warnings.append(
                f"weights {self.extractor.source['path']} are not the published ones: do not compare with other figures"
            )
        width = self.extractor.num_features
        for name, count in (("sample", num_samples), ("reference", self.num_reference_images)):
            if count is not None and count <= width:
                warnings.append(
                    f"{count} {name} images give a singular covariance of {width} features: the Frechet distance is "
                    "biased upwards (50,000 images are usual)"
                )
        return warnings


def _open_reference(config: EvaluatorConfig) -> tuple[StoredStatistics | None, ImageSet | None]:
    """Stored statistics and images of the reference, each None where it has none."""
    path = Path(config.reference)
    stored = load_statistics(path) if path.is_file() and path.suffix.lower() == ".npz" else None
    if stored is None:
        return None, open_images(path, num_workers=config.num_workers)
    if stored.kind not in ("", config.features):
        raise ValueError(
            f"{path} holds statistics of {stored.kind} features, but --features is {config.features}: choose "
            f"--features {stored.kind} or a reference with images"
        )
    with np.load(path) as npz:
        has_images = "arr_0" in npz.files
    return stored, open_images(path, num_workers=config.num_workers) if has_images else None
