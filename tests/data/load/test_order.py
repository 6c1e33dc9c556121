"""The order of samples in a run: a permutation per epoch, computed without memory."""

import pytest
import torch

from sfd_fast.data.load.order import flips, shuffled_indices


@pytest.mark.parametrize("num_samples", [1, 2, 3, 10, 17, 100, 1000, 4097])
def test_every_epoch_is_a_permutation(num_samples):
    for epoch in range(3):
        positions = torch.arange(num_samples) + epoch * num_samples
        indices = shuffled_indices(positions, num_samples, seed=5)
        assert torch.equal(indices.sort().values, torch.arange(num_samples))


def test_the_order_does_not_depend_on_how_positions_are_grouped():
    positions = torch.arange(95, 905)
    whole = shuffled_indices(positions, 100, seed=1)
    parts = [shuffled_indices(part, 100, seed=1) for part in positions.split(37)]
    assert torch.equal(whole, torch.cat(parts))


def test_epochs_and_seeds_have_different_orders():
    positions = torch.arange(1000)
    orders = [shuffled_indices(positions + e * 1000, 1000, seed) for e, seed in ((0, 0), (1, 0), (0, 1), (0, 2**40))]
    for i in range(4):
        for j in range(i):
            assert (orders[i] == orders[j]).float().mean() < 0.02  # 1 in 1000 expected


def test_the_order_looks_random():
    """Over many seeds every sample stands at every position equally often: chi-square of 7 x 7 within 5 sigma."""
    counts = torch.zeros(7, 7)
    trials = 3000
    for seed in range(trials):
        counts[torch.arange(7), shuffled_indices(torch.arange(7), 7, seed)] += 1
    chi2 = ((counts - trials / 7) ** 2 / (trials / 7)).sum()
    assert abs(chi2 - 36) < 5 * (2 * 36) ** 0.5 + 5


def test_neighbours_are_not_correlated():
    n = 100_000
    x = shuffled_indices(torch.arange(n), n, seed=3).double()
    x = x - x.mean()
    assert abs((x[1:] * x[:-1]).mean() / x.square().mean()) < 5 / n**0.5


def test_positions_past_2_to_the_32_work():
    n = 1_281_167
    start = n * 4000  # epoch 4000 of ImageNet, position 5.1e9
    indices = shuffled_indices(torch.arange(start, start + 1000), n, seed=0)
    assert len(set(indices.tolist())) == 1000 and 0 <= indices.min() <= indices.max() < n


def test_half_of_the_samples_are_flipped_and_it_depends_on_the_position_alone():
    positions = torch.arange(20_000)
    flipped = flips(positions, seed=4)
    assert abs(flipped.float().mean() - 0.5) < 5 * 0.5 / 20_000**0.5
    assert torch.equal(flipped[1234:1300], flips(positions[1234:1300], seed=4))
    assert 0.45 < (flipped == flips(positions, seed=5)).float().mean() < 0.55
