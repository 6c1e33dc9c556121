"""metrics.py and evaluation/statistics.py: torchmetrics, NumPy in fp64 and closed forms as references."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from harness import naive_evaluation as naive
from torch import nn

from sfd_fast.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from sfd_fast.evaluation.statistics import RunningStatistics, Statistics, load_statistics, save_statistics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")


def features(num_images, width, seed, *, shift=0.0, scale=1.0):
    """Correlated, shifted rows with spectra over two decades, as real features have."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((width, width)) * np.geomspace(1, 0.1, width)
    return (scale * rng.standard_normal((num_images, width)) @ mixing / math.sqrt(width) + shift).astype(np.float32)


def statistics(rows, *, batch_size=64):
    running = RunningStatistics(rows.shape[1])
    for batch in torch.from_numpy(rows).split(batch_size):
        running.update(batch)
    return running.result()


def gaussian(mean, covariance):
    return Statistics(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


class Given(nn.Module):
    """Hands torchmetrics features instead of images."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, rows):
        return rows


def test_frechet_distance_equals_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = features(300, 48, 0), features(250, 48, 1, shift=0.3)
    metric = FrechetInceptionDistance(feature=Given(48))
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    ours = frechet_distance(statistics(fake), statistics(real))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-3)
    assert ours > 1


def test_frechet_distance_equals_the_matrix_square_root_where_that_is_defined():
    real, fake = features(500, 40, 2), features(400, 40, 3, shift=0.1)
    root = scipy.linalg.sqrtm(np.cov(real, rowvar=False) @ np.cov(fake, rowvar=False)).real
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(np.cov(real.T) + np.cov(fake.T) - 2 * root)
    assert frechet_distance(statistics(fake), statistics(real)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_images", [20, 300])
def test_frechet_distance_is_right_for_singular_covariances(num_images):
    """20 images of 64 features: the covariances have rank 19, where a Schur square root is undefined."""
    real, fake = features(num_images, 64, 4), features(num_images + 5, 64, 5, scale=1.2)
    expected = naive.frechet_distance(fake, real)
    assert frechet_distance(statistics(fake), statistics(real)) == pytest.approx(expected, rel=1e-4)
    assert abs(frechet_distance(statistics(real), statistics(real))) < 1e-5


def test_frechet_distance_of_gaussians_with_a_common_basis():
    """In the common basis it is |difference of means|^2 + sum (sqrt a - sqrt b)^2."""
    basis = np.linalg.qr(np.random.default_rng(6).standard_normal((6, 6)))[0]
    a, b = np.array([0.0, 0.5, 1, 2, 4, 9]), np.array([1.0, 0.0, 1, 3, 1, 16])
    first = gaussian(np.zeros(6), basis * a @ basis.T)
    second = gaussian(np.full(6, 0.5), basis * b @ basis.T)
    expected = 6 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    # a zero eigenvalue comes out as about 1e-16, of which the square root is 1e-8
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_two_by_two_covariances_that_do_not_commute():
    """For 2 x 2, tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det(A B)))."""
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    distance = frechet_distance(gaussian([0.0, 0.0], a), gaussian([3.0, 4.0], b))
    assert distance == pytest.approx(25 + 3 + 4 - 2 * root, rel=1e-9)


def test_frechet_distance_refuses_different_features():
    with pytest.raises(ValueError, match="statistics of 2 and 3 features cannot be compared"):
        frechet_distance(gaussian(np.zeros(2), np.eye(2)), gaussian(np.zeros(3), np.eye(3)))


def test_inception_score_equals_torchmetrics_on_one_split():
    from torchmetrics.image.inception import InceptionScore

    logits = torch.from_numpy(3 * features(200, 30, 7))
    metric = InceptionScore(feature=Given(30), splits=1)
    metric.update(logits)
    mean, deviation = inception_score(logits, split_size=5000)
    assert mean == pytest.approx(metric.compute()[0].item(), rel=1e-3)
    assert mean > 1.5
    assert deviation == 0


def test_inception_score_averages_splits_in_order_and_the_last_as_it_comes():
    logits = 2 * features(110, 12, 8)
    mean, deviation = inception_score(torch.from_numpy(logits), split_size=50)
    assert mean == pytest.approx(naive.inception_score(logits, 50), rel=1e-9)
    assert deviation > 0


def test_inception_score_of_certain_and_of_blind_classifiers():
    certain = torch.eye(10).repeat(5, 1) * 1e4  # probabilities underflow to exactly 0
    assert inception_score(certain)[0] == pytest.approx(10, rel=1e-9)
    assert inception_score(torch.zeros(50, 10))[0] == pytest.approx(1, rel=1e-9)


def test_precision_and_recall_equal_the_definition():
    real, fake = features(60, 10, 9), features(50, 10, 10, shift=0.25)
    expected = naive.precision_recall(real, fake, k=3)
    assert 0.05 < min(expected) <= max(expected) < 1
    for block_size in (7, 10_000):
        ours = precision_recall(torch.from_numpy(real), torch.from_numpy(fake), block_size=block_size)
        assert ours == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_with_other_neighbourhoods():
    real, fake = features(40, 6, 11), features(40, 6, 12, shift=0.3)
    for k in (1, 5):
        ours = precision_recall(torch.from_numpy(real), torch.from_numpy(fake), num_neighbors=k)
        assert ours == pytest.approx(naive.precision_recall(real, fake, k), rel=1e-12)


def test_precision_and_recall_of_equal_and_of_distant_sets():
    real = torch.from_numpy(features(30, 8, 13))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    centre = real.mean(0).expand(30, 8) + 1e-3 * torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    precision, recall = precision_recall(real, centre)  # a collapsed generator: all samples real, little covered
    assert precision == 1
    assert recall < 0.2


def test_distances_survive_a_large_common_offset():
    real, fake = features(60, 10, 9), features(50, 10, 10, shift=0.25)
    offset = np.float32(256)
    ours = precision_recall(torch.from_numpy(real + offset), torch.from_numpy(fake + offset))
    assert ours == pytest.approx(naive.precision_recall(real + offset, fake + offset, k=3), abs=0.02)


def test_float16_rounds_features_and_distances_as_the_evaluator():
    real, fake = features(60, 200, 14, shift=4), features(60, 200, 15, shift=4.02)
    expected = naive.precision_recall(real, fake, k=3, half=True)
    ours = precision_recall(torch.from_numpy(real), torch.from_numpy(fake), precision="float16")
    assert ours == pytest.approx(expected, abs=1 / 60)  # one image may fall on the other side of a rounded border
    assert ours != precision_recall(torch.from_numpy(real), torch.from_numpy(fake))


def test_float16_falls_back_to_float32_where_distances_overflow():
    real, fake = 400 * torch.from_numpy(features(60, 10, 9)), 400 * torch.from_numpy(features(50, 10, 10, shift=0.25))
    expected = naive.precision_recall(real.numpy(), fake.numpy(), k=3)
    assert precision_recall(real, fake, precision="float16") == pytest.approx(expected, abs=0.02)


def test_precision_and_recall_need_more_images_than_neighbours():
    with pytest.raises(ValueError, match="k = 3 need more than 3 images on both sides; the smaller has 3"):
        precision_recall(torch.randn(10, 4), torch.randn(3, 4))


def test_kernel_distance_of_whole_sets_equals_torchmetrics_and_the_definition():
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = features(40, 16, 16), features(40, 16, 17, shift=0.4)
    metric = KernelInceptionDistance(feature=Given(16), subsets=2, subset_size=40)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    mean, deviation = kernel_distance(torch.from_numpy(real), torch.from_numpy(fake), num_subsets=2, subset_size=40)
    assert mean == pytest.approx(metric.compute()[0].item(), rel=1e-3)
    assert mean == pytest.approx(naive.kernel_distance(real, fake), rel=1e-4)
    assert deviation < 1e-6


def test_kernel_distance_draws_its_subsets_by_the_seed():
    real, fake = torch.from_numpy(features(100, 16, 18)), torch.from_numpy(features(90, 16, 19, shift=0.4))
    settings = {"num_subsets": 20, "subset_size": 40}
    first = kernel_distance(real, fake, seed=1, **settings)
    assert first == kernel_distance(real, fake, seed=1, **settings)
    assert first != kernel_distance(real, fake, seed=2, **settings)
    assert first[0] == pytest.approx(naive.kernel_distance(real[:90].numpy(), fake.numpy()), rel=0.2)
    assert 0 < first[1] < first[0]


def test_kernel_distance_refuses_subsets_larger_than_a_side():
    with pytest.raises(ValueError, match="100 subsets of 1000 cannot be drawn from 5 images: lower --kid_subset_size"):
        kernel_distance(torch.randn(10, 4), torch.randn(5, 4))


@pytest.mark.parametrize("batch_size", [1, 17, 200])
def test_streamed_statistics_equal_numpy(batch_size):
    rows = features(200, 24, 20, shift=0.5)
    ours = statistics(rows, batch_size=batch_size)
    np.testing.assert_allclose(ours.mean, rows.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(ours.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)
    assert ours.num_images == 200


def test_streamed_statistics_keep_their_digits_far_from_zero():
    """A mean 10^6 deviations away: sums of squares would lose 12 of 16 digits."""
    rows = torch.from_numpy(features(300, 8, 21)).double()
    running = RunningStatistics(8)
    for batch in (rows + 1e6).split(50):
        running.update(batch)
    np.testing.assert_allclose(running.result().covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-6, atol=1e-9)


def test_statistics_of_ranks_merge_to_those_of_all_images():
    rows = torch.from_numpy(features(100, 12, 22, shift=2))
    parts = [RunningStatistics(12) for _ in range(4)]  # the last rank has seen nothing
    for part, chunk in zip(parts, rows.split([10, 60, 30])):
        part.update(chunk)
    merged = RunningStatistics(12)
    for part in parts:
        merged.merge(part)
    whole = statistics(rows.numpy(), batch_size=100)
    torch.testing.assert_close(merged.result().mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.result().covariance, whole.covariance, rtol=1e-9, atol=1e-12)


def test_statistics_name_the_image_whose_features_are_not_finite():
    running = RunningStatistics(3)
    running.update(torch.ones(5, 3))
    bad = torch.ones(4, 3)
    bad[2, 1] = math.nan
    with pytest.raises(ValueError, match="features of image 7 are NaN or infinite"):
        running.update(bad)


def test_one_image_has_no_covariance():
    running = RunningStatistics(3)
    running.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"1 image\(s\) have no covariance: give at least 2"):
        running.result()


def test_stored_statistics_come_back_and_have_the_published_keys(tmp_path):
    pool, spatial = statistics(features(50, 6, 23)), statistics(features(50, 4, 24))
    path = tmp_path / "sub" / "statistics.npz"
    save_statistics(path, "inception", pool, spatial)
    with np.load(path) as npz:
        assert {"mu", "sigma", "mu_s", "sigma_s"} < set(npz.files)
    stored = load_statistics(path)
    assert (stored.kind, stored.pool.num_images) == ("inception", 50)
    assert torch.equal(stored.pool.covariance, pool.covariance)
    assert torch.equal(stored.spatial.mean, spatial.mean)


def test_statistics_of_pytorch_fid_are_read_without_a_spatial_part(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(3), sigma=np.eye(3))
    stored = load_statistics(tmp_path / "fid.npz")
    assert (stored.kind, stored.spatial, stored.pool.num_images) == ("", None, None)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    assert load_statistics(tmp_path / "images.npz") is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "holds mu but not sigma; it has mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \(3,\) and sigma \(4, 4\) must be \(F,\) and \(F, F\)"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.2, 1.0]])}, "sigma is no covariance: symmetric"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [2.0, 1.0]])}, "no negative eigenvalues"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "must be finite floating-point numbers"),
        ({"mu": np.zeros(2, dtype=np.int64), "sigma": np.eye(2)}, r"floating-point numbers \(int64, float64 given\)"),
    ],
)
def test_statistics_files_that_are_wrong_say_how(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_statistics(tmp_path / "wrong.npz")
