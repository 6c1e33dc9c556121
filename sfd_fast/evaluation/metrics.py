"""FID (and sFID), Inception Score, precision and recall, KID: functions of features, as OpenAI's guided-diffusion
evaluator defines them.

Shapes: N reference images, M samples, F features, K classes.
"""

import torch
from torch import Tensor

from sfd_fast.config.checks import one_of
from sfd_fast.evaluation.statistics import Statistics


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Frechet distance of two Gaussians.

    |mu_1 - mu_2|^2 + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^(1/2)), where the last trace is the sum of the square roots of
    the eigenvalues of the symmetric matrix S_1^(1/2) S_2 S_1^(1/2), which has those of S_1 S_2. Negative rounding is
    cut to zero. Unlike a Schur square root of the product itself (scipy.linalg.sqrtm) this is defined for singular
    covariances, which fewer images than features always give. The result is not clamped: equal Gaussians may give about
    -1e-10.
    Raises ValueError where the sizes differ.
    Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6; Dowson and Landau 1982.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"statistics of {first.mean.numel()} and {second.mean.numel()} features cannot be compared: both sides "
            "need the same features"
        )
    mean, covariance = second.mean.to(first.mean), second.covariance.to(first.covariance)
    eigenvalues, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T
    product = root @ covariance @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (first.mean - mean).square().sum() + first.covariance.trace() + covariance.trace() - 2 * trace_root
    return distance.item()


def inception_score(logits: Tensor, *, split_size: int = 5000) -> tuple[float, float]:
    """Inception Score, mean and standard deviation over splits.

    exp(mean over a split of KL(p(y|x) | p(y))), p(y) the split's mean; consecutive splits of `split_size`, the last one
    as long as it comes. logits: (M, K), without bias. The splits follow the order of the images, so that this must not
    be sorted by class.
    Source: Salimans et al. 2016 (arXiv 1606.03498); evaluator.py, compute_inception_score.
    """
    if logits.ndim != 2 or logits.shape[0] == 0 or split_size < 1:
        raise ValueError(
            f"the Inception Score needs logits (M, K) with M > 0 and split_size > 0; got {tuple(logits.shape)}, "
            f"{split_size}"
        )
    scores = []
    for part in logits.split(split_size):
        log_p = part.double().log_softmax(dim=1)
        p = log_p.exp()
        marginal = torch.special.entr(p.mean(dim=0)).sum()
        scores.append((marginal - torch.special.entr(p).sum(dim=1).mean()).exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """max(|u|^2 - 2 u v + |v|^2, 0) for all pairs, in the dtype of the inputs. (N, F), (M, F) -> (N, M)."""
    distances = (first @ second.T).mul_(-2)  # in place from here on: a block of 10,000 x 10,000 takes 400 MB
    return distances.add_(first.square().sum(1)[:, None]).add_(second.square().sum(1)).clamp_min_(0)


def _half_squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """The same with every intermediate value rounded to float16 and sums carried in fp32, as a GPU multiplies halves.

    fp32 throughout, so that a CPU, which multiplies halves eight times slower, gives the same figures.
    """

    def rounded(values: Tensor) -> Tensor:
        return values.half().float()

    first, second = rounded(first), rounded(second)
    norms = [rounded(rounded(rows.square()).sum(1)) for rows in (first, second)]
    distances = rounded(rounded(first @ second.T).mul_(-2))
    return rounded(rounded(distances.add_(norms[0][:, None])).add_(norms[1])).clamp_min_(0)


def _distances(first: Tensor, second: Tensor, precision: str) -> Tensor:
    if precision == "float16":
        rough = _half_squared_distances(first, second)
        if torch.isfinite(rough).all():
            return rough
    return _squared_distances(first, second)


def precision_recall(
    reference: Tensor, samples: Tensor, *, num_neighbors: int = 3, precision: str = "float32", block_size: int = 10_000
) -> tuple[float, float]:
    """Improved precision and recall.

    Each image owns the ball that reaches its k-th nearest neighbour in its own set. Precision: the share of samples
    inside some reference ball; recall: the share of reference images inside some sample's ball; the border belongs to
    the ball.
    reference: (N, F), samples: (M, F); all are used, in blocks of `block_size` rows.
    precision: "float32" (features centred first, which changes no distance and less is cancelled), or "float16", which
    rounds features and distances as the evaluator's TensorFlow graph does (fp32 for a block that overflows): a
    2048-feature squared distance then has three digits.
    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991); evaluator.py, ManifoldEstimator (k = 3, blocks of 10,000).
    """
    one_of("precision of the distances", precision, ("float32", "float16"))
    if reference.shape[1:] != samples.shape[1:]:
        raise ValueError(f"features differ: reference {tuple(reference.shape)}, samples {tuple(samples.shape)}")
    fewest = min(len(reference), len(samples))
    if not 0 < num_neighbors < fewest:
        raise ValueError(
            f"precision and recall with k = {num_neighbors} need more than {num_neighbors} images on both sides; the "
            f"smaller has {fewest}"
        )
    reference, samples = reference.float(), samples.float()
    if precision == "float32":
        centre = reference.mean(dim=0)
        reference, samples = reference - centre, samples - centre

    def radii(features: Tensor) -> Tensor:
        """Squared distance to the k-th neighbour; the nearest of the k + 1 smallest is the image itself."""
        result = []
        for rows in features.split(block_size):
            nearest = torch.empty(len(rows), 0, device=features.device)
            for columns in features.split(block_size):
                both = torch.cat([nearest, _distances(rows, columns, precision)], dim=1)
                nearest = both.topk(min(num_neighbors + 1, both.shape[1]), dim=1, largest=False).values
            result.append(nearest.amax(dim=1))
        return torch.cat(result)

    radii_reference, radii_samples = radii(reference), radii(samples)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    samples_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    for i in range(0, len(reference), block_size):
        for j in range(0, len(samples), block_size):
            rows, columns = slice(i, i + block_size), slice(j, j + block_size)
            distances = _distances(reference[rows], samples[columns], precision)
            samples_inside[columns] |= (distances <= radii_reference[rows, None]).any(dim=0)
            reference_inside[rows] |= (distances <= radii_samples[columns]).any(dim=1)
    return samples_inside.double().mean().item(), reference_inside.double().mean().item()


def kernel_distance(
    reference: Tensor, samples: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel (Inception) distance: unbiased squared MMD with the kernel (x y / F + 1)^3, mean and standard deviation
    over subsets.

    reference: (N, F), samples: (M, F). Each of `num_subsets` rounds draws `subset_size` rows of both without
    replacement by `seed`.
    Raises ValueError where a side has fewer images than a subset.
    Source: Binkowski et al. 2018 (arXiv 1801.01401), equation 4; 100 subsets of 1000 as torch-fidelity and
    torchmetrics.
    """
    if reference.shape[1:] != samples.shape[1:]:
        raise ValueError(f"features differ: reference {tuple(reference.shape)}, samples {tuple(samples.shape)}")
    fewest = min(len(reference), len(samples))
    if not 2 <= subset_size <= fewest or num_subsets < 1:
        raise ValueError(
            f"{num_subsets} subsets of {subset_size} cannot be drawn from {fewest} images: lower --kid_subset_size (at "
            "least 2)"
        )

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ y.T).double() / x.shape[1] + 1) ** 3

    def off_diagonal_mean(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (subset_size * (subset_size - 1))

    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(num_subsets):
        x = reference[torch.randperm(len(reference), generator=generator)[:subset_size].to(reference.device)].float()
        y = samples[torch.randperm(len(samples), generator=generator)[:subset_size].to(samples.device)].float()
        distances.append(off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean())
    distances = torch.stack(distances)
    return distances.mean().item(), distances.std(correction=0).item()
