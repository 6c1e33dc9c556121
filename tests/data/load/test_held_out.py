"""Held-out samples: spread over the whole set, the same everywhere, and never in the training part."""

import numpy as np
import pytest
import torch
from harness.tiny_run import write_data

from sfd_fast.data.load.features import FeatureShards
from sfd_fast.data.load.held_out import Part, held_out_numbers
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.data.load.loader import LatentLoader


@pytest.mark.parametrize(("num_samples", "count"), [(40, 8), (41, 8), (1000, 999), (10, 1), (50_000, 50_000), (7, 3)])
def test_one_sample_of_each_stretch_is_held_out(num_samples, count):
    numbers = held_out_numbers(num_samples, count)
    borders = [i * num_samples // count for i in range(count + 1)]
    assert all(low <= n < high for low, n, high in zip(borders, numbers, borders[1:]))


def test_every_class_of_an_ordered_set_has_its_share():
    labels = np.repeat(np.arange(100), 130)
    share = np.bincount(labels[held_out_numbers(len(labels), 1300)], minlength=100)
    assert share.min() >= 11 and share.max() <= 15


def test_a_period_of_the_order_meets_no_stride():
    """Labels 0 to 9 in turn and every tenth sample: a stride would hold out one class alone."""
    share = np.bincount(held_out_numbers(10_000, 1000) % 10, minlength=10)
    assert share.min() > 60


def test_the_choice_is_fixed():
    """Runs of earlier versions are continued with these samples."""
    assert held_out_numbers(1000, 5).tolist() == [10, 359, 473, 753, 945]


@pytest.mark.parametrize(("num_samples", "count"), [(40, 8), (23, 22), (23, 1), (1000, 333)])
def test_both_parts_together_are_the_whole_set_in_order(num_samples, count):
    held_out = held_out_numbers(num_samples, count)
    training = Part(0, num_samples - count, before=held_out - np.arange(count))
    rest = training.numbers(np.arange(num_samples - count))
    assert rest.tolist() == sorted(set(range(num_samples)) - set(held_out.tolist()))
    assert Part(0, count, chosen=held_out).numbers(np.arange(count)).tolist() == held_out.tolist()


@pytest.mark.parametrize("kind", [LatentShards, FeatureShards])
def test_shards_read_the_samples_of_their_part(tmp_path, kind):
    whole = kind(write_data(tmp_path))
    training, held_out = whole.divide(8)
    assert (len(training), len(held_out)) == (32, 8)

    def rows(part, numbers=None):
        numbers = torch.arange(len(part)) if numbers is None else numbers
        out = part.gather(numbers, torch.zeros(len(numbers), dtype=torch.bool))
        return out if isinstance(out, torch.Tensor) else out["texture"]

    for part in (training, held_out):
        assert torch.equal(rows(part), rows(whole, part.numbers(torch.arange(len(part)))))
        assert torch.equal(rows(part.slice(2, 7)), rows(part)[2:7])
    everything = torch.cat([training.numbers(torch.arange(32)), held_out.numbers(torch.arange(8))])
    assert torch.equal(everything.sort().values, torch.arange(40))


def test_the_loader_shows_the_training_part_whatever_the_world_size(tmp_path):
    whole = LatentShards(write_data(tmp_path))
    training, held_out = whole.divide(8)
    for world_size in (1, 2):
        loaders = [LatentLoader(training, 8, 0, rank, world_size) for rank in range(world_size)]
        indices = [loader.indices(loader.positions(step)) for loader in loaders for step in range(4)]
        shown = training.numbers(torch.cat(indices)).tolist()
        assert sorted(shown + held_out.numbers(torch.arange(8)).tolist()) == list(range(40))


def test_too_many_held_out_samples_are_refused(tmp_path):
    shards = LatentShards(write_data(tmp_path))
    assert shards.divide(0) == (shards, None)
    with pytest.raises(ValueError, match="validation_samples 40 leaves nothing of the 40 samples"):
        shards.divide(40)
