"""What a cache tells of the model to be trained on it."""

import pytest
import torch

from sfd_fast.data.cache.describe import describe
from sfd_fast.data.cache.shards import write_shard

pytest_plugins = ["harness.cache_fixtures"]


def test_a_cache_of_ours_tells_everything(encoded_cache):
    sizes = describe(encoded_cache)
    assert (sizes.texture_channels, sizes.semantic_channels, sizes.grid_size) == (4, 3, 8)
    assert (sizes.num_classes, sizes.trained_classes, sizes.feature_channels) == (3, (0, 1, 2), 24)


def test_a_released_cache_tells_classes_by_its_labels(tmp_path):
    for name, labels in (("a", [0, 7]), ("b", [3, 1])):
        latents = {"latents": torch.zeros(2, 4, 6, 6), "latents_dino": torch.zeros(2, 2, 6, 6)}
        latents["latents_sv"] = torch.zeros(2, 3, 6, 6)
        write_shard(tmp_path / f"{name}.safetensors", latents | {"labels": torch.tensor(labels)})
    sizes = describe(tmp_path)
    assert (sizes.texture_channels, sizes.semantic_channels, sizes.grid_size) == (4, 5, 6)
    assert (sizes.num_classes, sizes.trained_classes, sizes.feature_channels) == (8, None, None)


def test_a_cache_of_features_has_no_latents(tmp_path):
    write_shard(tmp_path / "a.safetensors", {"feats_dino": torch.zeros(2, 5, 3, 3), "labels": torch.arange(2)})
    sizes = describe(tmp_path)
    assert (sizes.texture_channels, sizes.semantic_channels) == (0, 0)
    assert (sizes.grid_size, sizes.feature_channels) == (3, 5)


def test_other_files_are_named(tmp_path):
    write_shard(tmp_path / "a.safetensors", {"weights": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match="a.safetensors has neither latents nor features; it holds weights"):
        describe(tmp_path)


@pytest.mark.parametrize("labels", [True, False])
def test_the_authors_feature_files_tell_width_grid_and_classes(tmp_path, labels):
    """patch_tokens (N, tokens, F) and class_idx (N,), without a manifest."""
    tensors = {"patch_tokens": torch.zeros(6, 9, 5)}
    if labels:
        tensors["class_idx"] = torch.tensor([0, 4, 2, 4, 1, 0])
    write_shard(tmp_path / "features_6samples.safetensors", tensors)
    sizes = describe(tmp_path)
    assert (sizes.texture_channels, sizes.semantic_channels) == (0, 0)
    assert (sizes.grid_size, sizes.feature_channels, sizes.num_classes) == (3, 5, 5 if labels else 0)


def test_features_of_another_shape_are_named(tmp_path):
    write_shard(tmp_path / "a.safetensors", {"feats_dino": torch.zeros(2, 5), "labels": torch.arange(2)})
    with pytest.raises(ValueError, match=r"a.safetensors: 'feats_dino' must be \(N, tokens, F\) or"):
        describe(tmp_path)
