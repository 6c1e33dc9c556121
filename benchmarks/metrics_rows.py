"""FID, sFID, IS, precision, recall and KID against independent implementations and closed forms, as benchmark rows.

    python benchmarks/metrics_rows.py

Independent: torchmetrics where it has the metric, else tests/naive_evaluation.py (NumPy in fp64, formulas of the
papers). A row's value is the worst relative difference; features are random ones, or those of the Inception network
with random weights from image files on. Letters: N images, F features.
"""

import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sfd_fast.evaluation import (
    Evaluator,
    EvaluatorConfig,
    RunningStatistics,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from harness import naive_evaluation as naive  # noqa: E402 (it stands in the tests' folder)

BAR = 1e-3
SEEDS = range(3)
WIDTH, NUM_REAL, NUM_FAKE = 96, 320, 300


def metrics_rows() -> list[dict]:
    """Rows of name, value (worst relative difference), unit, bar, holds; half a minute on one core."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics: it keeps all features, and its std of one split
        return [*random_features(), *random_inception(), *closed_forms()]


def row(name: str, pairs: Iterable[tuple[float, float]], bar: float = BAR) -> dict:
    """pairs: (ours, theirs)."""
    worst = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    return {"name": name, "value": worst, "unit": "relative", "bar": bar, "holds": worst <= bar}


def features(num_images: int, seed: int, *, shift: float = 0.0) -> np.ndarray:
    """Correlated rows with spectra over two decades, as real features have: (N, F) fp32."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((WIDTH, WIDTH)) * np.geomspace(1, 0.1, WIDTH)
    return (rng.standard_normal((num_images, WIDTH)) @ mixing / math.sqrt(WIDTH) + shift).astype(np.float32)


def statistics(rows: np.ndarray) -> Statistics:
    running = RunningStatistics(rows.shape[1])
    for batch in torch.from_numpy(rows).split(64):
        running.update(batch)
    return running.result()


class Given(nn.Module):
    """Hands torchmetrics features instead of images."""

    num_features = WIDTH

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def random_features() -> list[dict]:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    pairs: dict[str, list[tuple[float, float]]] = {}

    def add(name: str, ours: float, theirs: float) -> None:
        pairs.setdefault(name, []).append((ours, float(theirs)))

    for seed in SEEDS:
        real, fake = features(NUM_REAL, 2 * seed), features(NUM_FAKE, 2 * seed + 1, shift=0.2)
        as_tensors = torch.from_numpy(real), torch.from_numpy(fake)
        ours = frechet_distance(statistics(fake), statistics(real))
        theirs = FrechetInceptionDistance(feature=Given())
        theirs.update(as_tensors[0], real=True)
        theirs.update(as_tensors[1], real=False)
        add("FID (sFID: the same function), torchmetrics", ours, theirs.compute())
        add("FID, NumPy fp64", ours, naive.frechet_distance(fake, real))
        few = fake[: WIDTH // 2]
        singular = frechet_distance(statistics(few), statistics(real))
        add("FID of a singular covariance, NumPy fp64", singular, naive.frechet_distance(few, real))
        score = InceptionScore(feature=Given(), splits=1)
        score.update(3 * as_tensors[1])
        add("Inception Score, one split, torchmetrics", inception_score(3 * as_tensors[1])[0], score.compute()[0])
        ours = inception_score(3 * as_tensors[1], split_size=110)[0]
        add("Inception Score, three splits, NumPy fp64", ours, naive.inception_score(3 * fake, 110))
        both = zip(precision_recall(*as_tensors), naive.precision_recall(real, fake, k=3))
        for name, figures in zip(("precision", "recall"), both):
            add(f"{name} (float32 distances), NumPy fp64", *figures)
        # multiples of 1/8: their sums are exact in fp32, so that the order of adding is no matter
        coarse = [np.round(8 * rows + 20) / 8 for rows in (real, fake)]
        ours = precision_recall(*(torch.from_numpy(rows) for rows in coarse), precision="float16")
        for name, *figures in zip(("precision", "recall"), ours, naive.precision_recall(*coarse, k=3, half=True)):
            add(f"{name} (float16 distances, as the evaluator), NumPy float16", *figures)
        size = min(len(real), len(fake))
        kernel = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=size)
        kernel.update(as_tensors[0][:size], real=True)
        kernel.update(as_tensors[1], real=False)
        ours = kernel_distance(as_tensors[0][:size], as_tensors[1], num_subsets=1, subset_size=size)[0]
        add("KID of whole sets, torchmetrics", ours, kernel.compute()[0])
    return [row(f"random features: {name}", found) for name, found in pairs.items()]


def mosaics(num_images: int, seed: int) -> np.ndarray:
    """Random colour mosaics of 2 to 16 tiles a side, which a random network tells apart: uint8 (N, 16, 16, 3)."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        tiles = int(rng.choice([2, 4, 8, 16]))
        mosaic = rng.random((tiles, tiles, 3)) * rng.random(3) * 255
        images.append(mosaic.repeat(16 // tiles, 0).repeat(16 // tiles, 1))
    return np.stack(images).astype(np.uint8)


def random_inception() -> list[dict]:
    """From image files through our network to the figures, against the second implementation in fp64."""
    state = naive.random_inception_weights(seed=1)
    # a classifier that looks away from what all images share, or one class would win everywhere
    shared = naive.NaiveInception(state)(torch.zeros(1, 3, 299, 299, dtype=torch.float64))[0][0].float()
    classifier = state["fc.weight"]
    state["fc.weight"] = 5 * (classifier - torch.outer(classifier @ shared, shared) / shared.square().sum())
    real, fake = mosaics(5, 9), mosaics(6, 10)
    with tempfile.TemporaryDirectory() as folder:
        weights, reference = Path(folder) / "random.pth", Path(folder) / "real.npz"
        torch.save(state, weights)
        np.savez(reference, arr_0=real)
        evaluator = Evaluator(
            EvaluatorConfig(
                reference=str(reference),
                weights=str(weights),
                metrics=("fid", "sfid", "inception_score", "precision", "recall"),
                distance_precision="float32",
                split_size=4,
                num_neighbors=1,
                device="cpu",
                progress=False,
            )
        )
        evaluator.update(torch.from_numpy(fake))
        ours = evaluator.compute()
    real_pool, real_spatial, _ = naive.inception_features(state, real)
    fake_pool, fake_spatial, fake_logits = naive.inception_features(state, fake)
    precision, recall = naive.precision_recall(real_pool, fake_pool, k=1)
    theirs = {
        "FID": ("fid", naive.frechet_distance(fake_pool, real_pool)),
        "sFID": ("sfid", naive.frechet_distance(fake_spatial, real_spatial)),
        "Inception Score": ("inception_score", naive.inception_score(fake_logits, 4)),
        "precision": ("precision", precision),
        "recall": ("recall", recall),
    }
    return [
        row(f"Inception with random weights: {name}, NumPy and torch fp64", [(ours[key], value)])
        for name, (key, value) in theirs.items()
    ]


def closed_forms() -> list[dict]:
    """Frechet distances of Gaussians that are known by formula."""

    def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Statistics:
        return Statistics(torch.from_numpy(mean), torch.from_numpy(covariance))

    basis = np.linalg.qr(np.random.default_rng(6).standard_normal((6, 6)))[0]
    a, b = np.array([0.0, 0.5, 1, 2, 4, 9]), np.array([1.0, 0.0, 1, 3, 1, 16])
    commuting = frechet_distance(
        gaussian(np.zeros(6), basis * a @ basis.T), gaussian(np.full(6, 0.5), basis * b @ basis.T)
    )
    c, d = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    plane = frechet_distance(gaussian(np.zeros(2), c), gaussian(np.array([3.0, 4.0]), d))
    # tr (C D)^(1/2) of two-by-two matrices is sqrt(tr(C D) + 2 sqrt(det(C D)))
    root = math.sqrt(np.trace(c @ d) + 2 * math.sqrt(np.linalg.det(c @ d)))
    return [
        row("closed form: FID of Gaussians with common axes", [(commuting, 1.5 + ((a**0.5 - b**0.5) ** 2).sum())]),
        row("closed form: FID of Gaussians in the plane, axes turned", [(plane, 25 + 3 + 4 - 2 * root)]),
    ]


def main() -> None:
    start = time.monotonic()
    for found in metrics_rows():
        verdict = "holds" if found["holds"] else "DOES NOT HOLD"
        print(f"{found['name']:<84}{found['value']:>9.1e}   bar {found['bar']:g}: {verdict}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
