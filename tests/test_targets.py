"""REPA targets that are not stored equal what would have been stored, and only fit the cache they belong to."""

import pytest
import torch
from image_trees import write_tree
from safetensors.torch import load_file
from tiny_encoders import save_autoencoder, save_dinov2

from sfd_fast.checkpoint import load_semvae, save_model
from sfd_fast.config import SemVAEConfig
from sfd_fast.data.latents import LatentLoader, LatentShards
from sfd_fast.data.prepare import EncodeConfig, run_encode
from sfd_fast.data.targets import open_targets, with_targets
from sfd_fast.models.semvae import SemVAE


def save_semvae(folder, seed=0):
    torch.manual_seed(seed)
    config = SemVAEConfig(
        feature_channels=24, hidden_size=24, num_heads=2, encoder_depth=1, decoder_depth=1, latent_channels=3
    )
    save_model(folder, SemVAE(config))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with stored features of 9 photographs, and what made it."""
    root = tmp_path_factory.mktemp("targets")
    tree = write_tree(root / "tree", {"china": 5, "hopper": 4})
    parts = {"vfm": save_dinov2(root / "vfm"), "semvae": save_semvae(root / "semvae")}
    config = EncodeConfig(
        images=str(tree), texture_codec=str(save_autoencoder(root / "codec")), out=str(root / "cache"), image_size=32,
        features=True, storage="fp32", shard_size=4, batch_size=4, num_threads=1, device="cpu",
        **{name: str(path) for name, path in parts.items()},
    )  # fmt: skip
    run_encode(config)
    return root, parts


def batches(shards, kind, parts, count=4, start_step=0):
    statistics = shards.statistics()
    targets = open_targets(kind, shards, statistics, **({} if kind == "stored" else parts))
    loader = LatentLoader(shards, 4, seed=1, start_step=start_step, statistics=statistics, features=kind == "stored")
    return [batch for _, batch in zip(range(count), with_targets(loader, targets))]


def test_stored_targets_come_from_the_loader(made):
    root, parts = made
    batch = batches(LatentShards(root / "cache"), "stored", parts, 1)[0]
    assert batch["features"].shape == (4, 24, 8, 8)


@pytest.mark.parametrize("sliced", [False, True])
def test_online_targets_equal_the_stored_ones(made, sliced):
    """Of the same images, flips included, also of a slice that does not start at the first image."""
    root, parts = made
    shards = LatentShards(root / "cache")
    shards = shards.slice(3, 9) if sliced else shards
    for a, b in zip(batches(shards, "stored", parts, 6), batches(shards, "online", parts, 6), strict=True):
        assert torch.equal(a["sample_ids"], b["sample_ids"])
        stored = a["features"].float().flatten(2).transpose(1, 2)
        torch.testing.assert_close(b["features"], stored, rtol=2e-3, atol=2e-3)


def test_online_targets_continue_after_a_resume(made):
    root, parts = made
    shards = LatentShards(root / "cache")
    whole = batches(shards, "online", parts, 4)
    rest = batches(shards, "online", parts, 2, start_step=2)
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a["features"], b["features"])


def test_online_targets_find_images_that_moved(made, tmp_path):
    root, parts = made
    write_tree(tmp_path / "elsewhere", {"china": 5, "hopper": 4})
    shards = LatentShards(root / "cache")
    a, b = (batches(shards, "online", parts | more, 1)[0] for more in ({}, {"images": tmp_path / "elsewhere"}))
    assert torch.equal(a["features"], b["features"])


def test_semvae_targets_decode_the_stored_semantic_latent(made):
    root, parts = made
    shards = LatentShards(root / "cache")
    tensors = [load_file(path) for path in sorted((root / "cache").glob("shard-*.safetensors"))]
    semantic = {flip: torch.cat([t["latents_sv" + flip] for t in tensors]) for flip in ("", "_flip")}
    semvae = load_semvae(parts["semvae"])
    loader = LatentLoader(shards, 4, seed=1)
    for batch in batches(shards, "semvae", parts, 4):
        index, flip = loader.indices(batch["sample_ids"]), loader.flips(batch["sample_ids"])
        chosen = torch.where(flip.view(-1, 1, 1, 1), semantic["_flip"][index], semantic[""][index])
        with torch.no_grad():
            expected = semvae.decode(chosen.flatten(2).transpose(1, 2))
        torch.testing.assert_close(batch["features"], expected, rtol=1e-4, atol=1e-4)
        assert not batch["features"].requires_grad


def test_targets_say_their_shape(made):
    root, parts = made
    shards = LatentShards(root / "cache")
    for kind in ("semvae", "online"):
        assert open_targets(kind, shards, shards.statistics(), **parts).shape == (64, 24)


def test_parts_of_another_cache_are_refused(made, tmp_path):
    root, parts = made
    shards = LatentShards(root / "cache")
    with pytest.raises(ValueError, match="was encoded with another semvae"):
        open_targets("semvae", shards, shards.statistics(), semvae=save_semvae(tmp_path / "s", seed=1))
    with pytest.raises(ValueError, match="was encoded with another vfm"):
        open_targets("online", shards, shards.statistics(), vfm=save_dinov2(tmp_path / "v", seed=1))
    write_tree(tmp_path / "tree", {"china": 5, "hopper": 4}, seed=1)
    with pytest.raises(OSError, match="changed since it was screened"):
        batches(shards, "online", parts | {"images": tmp_path / "tree"}, 1)
    with pytest.raises(ValueError, match="semvae targets need the SemVAE"):
        open_targets("semvae", shards, shards.statistics())
