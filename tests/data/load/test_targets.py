"""REPA targets that are not stored equal what would have been stored, and only fit the cache they belong to."""

import shutil
from dataclasses import replace

import fsspec
import pytest
import torch
from harness.image_trees import write_tree
from harness.tiny_encoders import save_autoencoder, save_dinov2
from safetensors.torch import load_file

from sfd_fast.commands.encode import EncodeConfig, run_encode
from sfd_fast.config import DataConfig, ModelConfig, RunConfig, SemVAEConfig, SFDConfig, TrainConfig, TransportConfig
from sfd_fast.data.cache.shards import write_shard
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.data.load.loader import LatentLoader
from sfd_fast.data.load.targets import open_targets, with_targets
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.formats.model_folder import save_model
from sfd_fast.formats.released_model import load_semvae
from sfd_fast.models.semvae import SemVAE
from sfd_fast.training.diffusion import diffusion_job, run_train


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
        features=True, flip=True, storage="fp32", shard_size=4, batch_size=4, num_threads=1, device="cpu",
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
    with pytest.raises(ValueError, match="changed since it was screened.*set data.images"):
        open_targets("online", shards, shards.statistics(), images=tmp_path / "tree", vfm=parts["vfm"])
    with pytest.raises(ValueError, match="semvae targets need the SemVAE.*set data.semvae"):
        open_targets("semvae", shards, shards.statistics())


def test_an_unknown_kind_is_refused(made):
    root, parts = made
    shards = LatentShards(root / "cache")
    with pytest.raises(ValueError, match="data.targets 'onlin' is unknown; choose stored, semvae or online"):
        open_targets("onlin", shards, shards.statistics(), **parts)


def test_online_targets_say_what_they_miss(made, tmp_path):
    root, parts = made
    shutil.copytree(root / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("index"))
    shards = LatentShards(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="index/index.safetensors is missing: online targets need it"):
        open_targets("online", shards, shards.statistics(), vfm=parts["vfm"])
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has no manifest: online targets need a cache made by `sfd encode`"):
        open_targets("online", shards, shards.statistics(), vfm=parts["vfm"])


def test_held_out_batches_in_between_do_not_make_training_decode_again(made):
    root, parts = made
    shards = LatentShards(root / "cache")
    targets = open_targets("online", shards, shards.statistics(), **parts)
    latents, plain = torch.zeros(2, 7, 8, 8), torch.zeros(2, dtype=torch.bool)
    targets.expect(torch.tensor([0, 1]))
    decoded = []
    inner = targets._decoded
    targets._decoded = lambda number: decoded.append(number) or inner(number)
    targets(latents, torch.tensor([5, 6]), plain)
    targets(latents, torch.tensor([0, 1]), plain)
    assert sorted(decoded) == [5, 6]


# ---------------------------------------------------------------- training with them


def training_config(root, parts, out, kind, **data):
    """Two steps of a tiny network on the cache, with held-out samples."""
    names = {"stored": (), "semvae": ("semvae",), "online": ("vfm",)}[kind]
    return SFDConfig(
        model=ModelConfig(
            hidden_size=32, depth=2, num_heads=2, patch_size=1, grid_size=8, texture_channels=4, semantic_channels=3,
            num_classes=2, repa_channels=24, repa_depth=1, repa_hidden=16,
        ),
        data=DataConfig(
            path=str(root / "cache"), validation_samples=2, targets=kind, **{n: str(parts[n]) for n in names}, **data
        ),
        train=TrainConfig(max_steps=2, global_batch_size=4, precision="fp32"),
        run=RunConfig(out=str(out), log_every=1, validate_every=2, sample_every=0, tensorboard=False),
    )  # fmt: skip


def train(config):
    return run_train(config, device="cpu", progress=False)


@pytest.fixture(scope="module")
def runs(made, tmp_path_factory):
    """The same short run with each kind of targets."""
    root, parts = made
    out = tmp_path_factory.mktemp("runs")
    kinds = ("stored", "semvae", "online")
    return {kind: train(training_config(root, parts, out / kind, kind)).metrics for kind in kinds}


def figures(rows, kind, name):
    return [row[name] for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_training_with_online_targets_equals_training_with_stored_ones(runs, kind):
    for name in ("loss", "repa"):
        online, stored = (figures(runs[targets], kind, name) for targets in ("online", "stored"))
        assert online == pytest.approx(stored, rel=1e-3)


def test_training_with_semvae_targets_aligns_with_what_the_semvae_decodes(made, runs):
    """The first loss by hand: an independent pass over the first batch with features decoded from the cache."""
    root, parts = made
    job = diffusion_job(training_config(root, parts, root / "by_hand", "stored"))
    loader = LatentLoader(LatentShards(root / "cache").divide(2)[0], 4, 0)
    batch = next(iter(loader))
    raw = loader.shards.gather(loader.indices(batch["sample_ids"]), loader.flips(batch["sample_ids"]))
    with torch.no_grad():
        batch["features"] = load_semvae(parts["semvae"]).decode(raw["semantic"].float().flatten(2).transpose(1, 2))
        _, terms = job.objective(job.model, batch)
    assert figures(runs["semvae"], "train", "repa")[0] == pytest.approx(float(terms["repa"].mean()), rel=1e-5)
    assert figures(runs["semvae"], "train", "repa")[0] != pytest.approx(figures(runs["stored"], "train", "repa")[0])
    assert figures(runs["semvae"], "validation", "repa") != figures(runs["stored"], "validation", "repa")


def test_a_cache_without_features_trains_with_semvae_targets(made, tmp_path):
    """What `sfd encode` writes by default."""
    root, parts = made
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in sorted((root / "cache").glob("shard-*.safetensors")):
        write_shard(cache / path.name, {k: v for k, v in load_file(path).items() if not k.startswith("feats")})
    LatentStatistics.load(root / "cache").save(cache)
    with pytest.raises(ValueError, match="has no VFM features.*set data.targets to semvae or online"):
        train(training_config(tmp_path, parts, tmp_path / "a", "stored"))
    assert train(training_config(tmp_path, parts, tmp_path / "b", "semvae")).step == 2


def test_a_run_continues_with_the_targets_it_began_with_alone(made, tmp_path):
    """Where they lie may change, which weights they come from may not."""
    root, parts = made
    config = training_config(root, parts, tmp_path / "run", "semvae")
    train(config)
    longer = replace(config, train=replace(config.train, max_steps=3))
    shutil.copytree(parts["semvae"], tmp_path / "moved")
    assert train(replace(longer, data=replace(longer.data, semvae=str(tmp_path / "moved")))).step == 3
    stored = training_config(root, parts, tmp_path / "run", "stored")
    with pytest.raises(ValueError, match="data.targets was 'semvae' and is 'stored'"):
        train(stored)
    (tmp_path / "cache").mkdir()  # without its manifest the cache itself cannot tell one SemVAE from another
    for path in (root / "cache").glob("*s*.*t*"):
        if path.name != "manifest.json":
            shutil.copy(path, tmp_path / "cache")
    other = {"path": str(tmp_path / "cache"), "semvae": str(save_semvae(tmp_path / "other", seed=1))}
    with pytest.raises(ValueError, match="trained on other data: target_weights was"):
        train(replace(longer, data=replace(longer.data, **other)))


def test_online_targets_of_a_remote_cache_find_its_index(made, tmp_path):
    root, parts = made
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(root / "cache"), "/bucket/online", recursive=True)
    try:
        remote = LatentShards("memory://bucket/online", cache_folder=tmp_path)
    finally:
        filesystem.rm("/bucket/online", recursive=True)
    a, b = (batches(shards, "online", parts, 1)[0] for shards in (remote, LatentShards(root / "cache")))
    assert torch.equal(a["features"], b["features"])


def test_targets_that_are_not_used_are_said(made, tmp_path):
    root, parts = made
    config = training_config(root, parts, tmp_path, "semvae")
    job = diffusion_job(replace(config, transport=TransportConfig(repa_weight=0.0)))
    assert job.notes == ("transport.repa_weight is 0: data.targets is not used",)
    assert diffusion_job(config).notes == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "features"}, "data.targets 'features' is unknown; choose stored, semvae or online"),
        ({"targets": "semvae"}, "data.targets 'semvae' needs data.semvae"),
        ({"targets": "online"}, "data.targets 'online' needs data.vfm"),
        ({"semvae": "x"}, "data.semvae is given, but data.targets is 'stored'.*set data.targets to 'semvae'"),
        ({"targets": "semvae", "semvae": "x", "images": "y"}, "data.images is given, but data.targets is 'semvae'"),
    ],
)
def test_settings_of_targets_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
