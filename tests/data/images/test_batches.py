"""Epochs of images over ranks: complete, disjoint, seeded, resumable."""

import pytest
import torch
from harness.image_trees import write_tree

from sfd_fast.data.images.batches import ImageLoader
from sfd_fast.data.images.decode import load
from sfd_fast.data.images.index import open_index


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return open_index(write_tree(root / "tree"), root / "out", report=lambda _: None)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_ranks_share_every_epoch_without_duplicates_or_losses(index, world_size, batch_size):
    for epoch in range(2):
        loaders = [ImageLoader(index, 16, batch_size, rank=r, world_size=world_size) for r in range(world_size)]
        shares = [loader.batches(epoch) for loader in loaders]
        numbers = torch.cat([batch for share in shares for batch in share])
        assert sorted(numbers.tolist()) == list(range(13))
        assert all(len(batch) == batch_size for share in shares for batch in share[:-1])
        sizes = [sum(map(len, share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_batches_are_the_decoded_images_with_their_labels(index):
    seen = 0
    for batch in ImageLoader(index, 16, 5, seed=3):
        assert torch.equal(batch["images"], torch.stack([load(index.read(int(i)), 16) for i in batch["numbers"]]))
        assert batch["labels"].tolist() == [int(index.labels[i]) for i in batch["numbers"]]
        seen += len(batch["numbers"])
    assert seen == 13


def test_a_position_continues_exactly(index):
    loader = ImageLoader(index, 16, 3, seed=1)
    whole = [list(loader), list(loader)]
    assert loader.position == (2, 0)
    resumed = ImageLoader(index, 16, 3, seed=1)
    for _, _ in zip(range(2), resumed):
        pass
    assert resumed.position == (0, 2)
    again = ImageLoader(index, 16, 3, seed=1, position=resumed.position)
    rest = [*again, *again]
    assert [b["numbers"].tolist() for b in rest] == [b["numbers"].tolist() for b in whole[0][2:] + whole[1]]
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(rest, whole[0][2:] + whole[1]))


def test_epochs_and_seeds_have_their_own_order(index):
    order = lambda **k: torch.cat(ImageLoader(index, 16, 13, **k).batches(k.pop("epoch", 0)))  # noqa: E731
    assert not torch.equal(order(), order(seed=1))
    loader = ImageLoader(index, 16, 13)
    assert not torch.equal(loader.batches(0)[0], loader.batches(1)[0])
    assert torch.equal(order(shuffle=False), torch.arange(13))
