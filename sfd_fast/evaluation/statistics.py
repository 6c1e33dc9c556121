"""Mean and covariance of features: streamed in fp64, mergeable across processes, stored in the evaluator's npz layout.

Shapes: B batch, N images, F features.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.home import with_home

ROUNDING = 1e-5
"""of the largest entry: more than fp32 loses where a covariance was computed or stored in it"""


@dataclass(frozen=True)
class Statistics:
    """Gaussian fitted to features: mean (F,) and unbiased covariance (F, F), both fp64."""

    mean: Tensor
    covariance: Tensor
    num_images: int | None = None  # None: a stored file does not say


class RunningStatistics:
    """Mean and covariance of rows that arrive in batches.

    Keeps n, the mean and M = sum (x - mean)(x - mean)^T; two sets merge by
        mean = mean_a + d n_b / n,   M = M_a + M_b + d d^T n_a n_b / n,   d = mean_b - mean_a,
    so nothing is lost to cancellation where |mean| is far above the standard deviation (sum x x^T - n mean mean^T would
    lose it).
    Source: Chan, Golub and LeVeque 1979.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu"):
        self.num_images = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add rows. features: (B, F), any float dtype. Raises ValueError for another width or values that are not
        finite."""
        if features.ndim != 2 or features.shape[1] != self.mean.numel():
            raise ValueError(
                f"features of shape {tuple(features.shape)} do not fit statistics of (B, {self.mean.numel()})"
            )
        finite = torch.isfinite(features).all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(
                f"features of image {self.num_images + row} are NaN or infinite: the extractor's weights or its "
                "precision are at fault "
                "(run it in fp32), not the images"
            )
        rows = features.to(device=self.mean.device, dtype=torch.float64)
        if rows.shape[0] == 0:
            return
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._merge(rows.shape[0], mean, centred.T @ centred)

    def merge(self, other: "RunningStatistics") -> None:
        """Add all rows that `other` has seen."""
        self._merge(other.num_images, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))

    def _merge(self, num_images: int, mean: Tensor, scatter: Tensor) -> None:
        if num_images == 0:
            return
        total = self.num_images + num_images
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(delta, delta, alpha=self.num_images * num_images / total)
        self.mean += delta * (num_images / total)
        self.num_images = total

    def result(self) -> Statistics:
        """Mean and M / (n - 1), as numpy.cov. Raises ValueError for fewer than two images."""
        if self.num_images < 2:
            raise ValueError(
                f"{self.num_images} image(s) have no covariance: give at least 2 (FID is meant for 50,000)"
            )
        return Statistics(self.mean.clone(), self.scatter / (self.num_images - 1), self.num_images)


@dataclass(frozen=True)
class StoredStatistics:
    """What a statistics file holds. kind: the features it was made with, "" where the file does not say (as OpenAI's do
    not)."""

    kind: str
    pool: Statistics
    spatial: Statistics | None


@with_home
def save_statistics(path: str | Path, kind: str, pool: Statistics, spatial: Statistics | None = None) -> None:
    """Write mu, sigma (and mu_s, sigma_s) as in OpenAI's reference batches, plus `kind` and `num_images`."""
    arrays = {"mu": pool.mean, "sigma": pool.covariance}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    arrays = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
    content = io.BytesIO()  # numpy.savez would append .npz to a name with any other ending
    np.savez(content, kind=np.array(kind), num_images=np.array(pool.num_images or 0), **arrays)
    write_atomically(Path(path), content.getbuffer())


def is_saved(path: Path) -> bool:
    """Whether save_statistics wrote a file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile:
        return False
    return {"mu", "sigma", "kind"} <= names <= {"mu", "sigma", "mu_s", "sigma_s", "kind", "num_images"}


def is_covariance(matrix: Tensor) -> bool:
    """Whether a matrix (F, F) fp64 is symmetric and positive semidefinite, up to the rounding of fp32."""
    scale = matrix.abs().max()
    if (matrix - matrix.T).abs().max() > ROUNDING * scale:
        return False
    return bool(torch.linalg.eigvalsh(matrix)[0] >= -ROUNDING * len(matrix) * scale) if len(matrix) else True


@with_home
def load_statistics(path: str | Path) -> StoredStatistics | None:
    """Statistics stored in an npz, or None where it holds none (images only).

    Raises ValueError for a file that is no npz, for mu without sigma, and for wrong shapes or values.
    """
    try:
        with np.load(path, allow_pickle=False) as npz:
            names = set(npz.files)
            if "mu" not in names:
                return None
            arrays = {
                name: npz[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "kind", "num_images") if name in names
            }
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read as npz ({error}): it may be cut short; write or download it again"
        ) from error
    num_images = int(arrays["num_images"]) if "num_images" in arrays else 0

    def gaussian(mean: str, covariance: str) -> Statistics:
        if covariance not in arrays:
            raise ValueError(f"{path} holds {mean} but not {covariance}; it has {', '.join(sorted(names))}")
        mu, sigma = arrays[mean], arrays[covariance]
        if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
            raise ValueError(f"{path}: {mean} {mu.shape} and {covariance} {sigma.shape} must be (F,) and (F, F)")
        if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(
                f"{path}: {mean} and {covariance} must be finite floating-point numbers ({mu.dtype}, {sigma.dtype} "
                "given)"
            )
        made = Statistics(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double(), num_images or None)
        if not is_covariance(made.covariance):
            raise ValueError(f"{path}: {covariance} is no covariance: symmetric, no negative eigenvalues")
        return made

    spatial = gaussian("mu_s", "sigma_s") if "mu_s" in arrays else None
    return StoredStatistics(str(arrays.get("kind", "")), gaussian("mu", "sigma"), spatial)
