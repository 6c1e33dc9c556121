"""Training SemVAE on streamed feature shards."""

from dataclasses import replace

import fsspec
import pytest
import torch
from harness.tiny_run import checkpoint_tensors, run_and_train, write_data
from safetensors.torch import load_file, save_file

from sfd_fast.config import (
    FeatureDataConfig,
    OptimizerConfig,
    SemVAEConfig,
    SemVAETrainingConfig,
    SFDConfig,
    TrainConfig,
)
from sfd_fast.data.cache.manifest import begin
from sfd_fast.data.cache.shards import write_shard
from sfd_fast.data.load.features import FeatureLoader, FeatureShards
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.transport import noise
from sfd_fast.models.semvae import SemVAE
from sfd_fast.training.loop import Stop
from sfd_fast.training.semvae import run_train_semvae, semvae_job, semvae_terms, with_length


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("latents"))


def config(data, out, **train):
    settings = {
        "max_steps": 8, "global_batch_size": 8, "precision": "fp32", "log_every": 4, "validate_every": 4,
        "sample_every": 0, "checkpoint_every": 4, "tensorboard": False,
    } | train  # fmt: skip
    return SemVAETrainingConfig(
        semvae=SemVAEConfig(
            feature_channels=8, hidden_size=16, num_heads=2, encoder_depth=1, decoder_depth=1, latent_channels=3
        ),
        optimizer=OptimizerConfig(lr=3e-3, ema_decay=0.0),
        data=FeatureDataConfig(path=str(data), validation_samples=8),
        **run_and_train(out=str(out), **settings),
    )


def train(config):
    return run_train_semvae(config, device="cpu", progress=False)


def last_weights(out, step):
    saved = checkpoint_tensors(out, step)
    return {key.removesuffix("|param"): value for key, value in saved.items() if key.endswith("|param")}


@pytest.mark.parametrize("architecture", ["transformer", "linear", "mlp", "resnet"])
def test_training_lowers_the_held_out_loss(tmp_path, data, architecture):
    settings = config(data, tmp_path / "run", max_steps=120, validate_every=40, checkpoint_every=120)
    settings = replace(settings, semvae=replace(settings.semvae, architecture=architecture))
    losses = [row["loss"] for row in train(settings).metrics if row["kind"] == "validation"]
    assert losses[-1] < losses[0]


def test_objective_is_the_models_loss_at_its_own_noise(data, tmp_path):
    settings = config(data, tmp_path / "run")
    torch.manual_seed(0)
    model = SemVAE(settings.semvae)
    batch = FeatureLoader(FeatureShards(data), 8, 0).batch(5)
    total, terms = semvae_terms(model, batch, settings)
    mean, logvar = model.encode(batch["features"])
    eps = noise(torch.arange(40, 48), (4, 3), settings.train.seed, random_numbers.SEMVAE_NOISE)
    reconstruction = model.decode(mean + torch.exp(logvar / 2) * eps)
    mse = torch.nn.functional.mse_loss(reconstruction, batch["features"])
    cosine = torch.nn.functional.cosine_similarity(reconstruction, batch["features"], dim=-1).mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2)).mean()
    torch.testing.assert_close(total, mse + 1 - cosine + 1e-7 * kl)
    torch.testing.assert_close(terms["mse"].mean(), mse)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, data, monkeypatch):
    train(config(data, tmp_path / "a"))
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        patch.setattr(Stop, "requested", lambda self: next(calls) == 5)
        assert train(config(data, tmp_path / "b")).step == 5
    train(config(data, tmp_path / "b"))
    a, b = last_weights(tmp_path / "a", 8), last_weights(tmp_path / "b", 8)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_without_ema_the_exported_model_is_the_last_one(tmp_path, data):
    from sfd_fast.formats.released_model import load_semvae

    result = train(config(data, tmp_path / "run"))
    weights = last_weights(tmp_path / "run", 8)
    for name, value in load_semvae(result.model).state_dict().items():
        assert torch.equal(value.flatten(), weights[name]), name


def test_pca_is_fitted_in_one_pass(tmp_path, data):
    from sfd_fast.formats.released_model import load_semvae

    settings = config(data, tmp_path / "run")
    settings = replace(settings, semvae=replace(settings.semvae, architecture="pca"))
    model = load_semvae(train(settings).model)
    shards, _ = FeatureShards(data).divide(8)
    tokens = shards.gather(torch.arange(32), torch.zeros(32, dtype=torch.bool)).flatten(0, 1).double()
    _, _, components = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    overlap = (model.pca.components.double() @ components[:3].t()).abs()
    torch.testing.assert_close(overlap, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(model.pca.mean.double(), tokens.mean(0), rtol=0, atol=1e-6)


def test_ranks_share_each_batch_and_cover_an_epoch(data):
    shards = FeatureShards(data)
    whole = FeatureLoader(shards, 8, seed=3).batch(2)
    parts = [FeatureLoader(shards, 8, seed=3, rank=r, world_size=2).batch(2) for r in range(2)]
    assert torch.equal(whole["features"], torch.cat([p["features"] for p in parts]))
    epoch = torch.cat([FeatureLoader(shards, 8, seed=3, flip=False).batch(k)["features"] for k in range(5)])
    everything = shards.gather(torch.arange(40), torch.zeros(40, dtype=torch.bool))
    assert torch.equal(epoch.flatten(1)[:, 0].sort().values, everything.flatten(1)[:, 0].sort().values)


def test_features_that_do_not_fit_are_refused(tmp_path, data):
    settings = config(data, tmp_path / "run")
    with pytest.raises(ValueError, match="features of 8 channels, semvae.feature_channels is 16: set it to 8"):
        train(replace(settings, semvae=replace(settings.semvae, feature_channels=16)))
    write_shard(tmp_path / "other" / "a.safetensors", {"latents": torch.zeros(2, 2, 4, 4)})
    with pytest.raises(ValueError, match="has no tensor 'feats_dino', it holds latents"):
        train(replace(settings, data=FeatureDataConfig(path=str(tmp_path / "other"))))
    with pytest.raises(ValueError, match="data.path is empty"):
        train(replace(settings, data=FeatureDataConfig()))


@pytest.mark.parametrize(
    "change", [{"checkpoint_activations": 0.5}, {"residual": "bf16"}, {"attention": "sdpa"}, {"init_from": "x"}]
)
def test_settings_of_the_transformer_are_refused(tmp_path, data, change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"train.{name} .* is a setting of the diffusion transformer"):
        train(config(data, tmp_path / "run", **change))


def feature_shard(folder, name, *, flip=True, fingerprint="1", dtype=torch.float16):
    rows = torch.randn(4, 8, 2, 2).to(dtype)
    tensors = {"feats_dino": rows} | ({"feats_dino_flip": rows} if flip else {})
    write_shard(folder / name, tensors, {"fingerprint": fingerprint})


def test_shards_of_two_encodings_do_not_mix(tmp_path):
    feature_shard(tmp_path, "a.safetensors")
    feature_shard(tmp_path, "b.safetensors", fingerprint="2")
    with pytest.raises(ValueError, match="b.safetensors was encoded with other settings than .*a.safetensors"):
        FeatureShards(tmp_path)


def test_shards_of_another_dtype_do_not_mix(tmp_path):
    feature_shard(tmp_path, "a.safetensors")
    feature_shard(tmp_path, "b.safetensors", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"b.safetensors has features of shape \(8, 2, 2\), torch.float32"):
        FeatureShards(tmp_path)


def test_an_unfinished_folder_of_features_is_refused(tmp_path):
    begin(tmp_path, {"kind": "features"}, {})
    feature_shard(tmp_path, "a.safetensors")
    with pytest.raises(ValueError, match="is an unfinished cache: run the same command again"):
        FeatureShards(tmp_path)


def test_a_missing_folder_of_features_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; a cache is a folder"):
        FeatureShards(tmp_path / "nowhere")


def test_flips_that_are_not_stored_are_an_error_that_names_the_shard(tmp_path):
    feature_shard(tmp_path, "a.safetensors")
    feature_shard(tmp_path, "b.safetensors", flip=False)
    shards = FeatureShards(tmp_path)
    with pytest.raises(ValueError, match=r"b.safetensors has no flipped features .*set data.flip to false"):
        FeatureLoader(shards, 4, 0)
    assert FeatureLoader(shards, 4, 0, flip=False).batch(0)["features"].shape == (4, 4, 8)


def test_features_train_from_remote_storage(tmp_path, data):
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(data), "/bucket/features", recursive=True)
    settings = config("memory://bucket/features", tmp_path / "run", max_steps=1)
    settings = replace(settings, data=replace(settings.data, cache_folder=str(tmp_path / "local")))
    try:
        assert train(settings).step == 1
    finally:
        filesystem.rm("/bucket/features", recursive=True)


def test_a_bad_step_names_the_features_at_fault(tmp_path, data):
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = {name: value.clone() for name, value in load_file(tmp_path / "part1.safetensors").items()}
    shard["feats_dino"][:] = shard["feats_dino_flip"][:] = float("nan")
    save_file(shard, tmp_path / "part1.safetensors")
    events = [row["message"] for row in train(config(tmp_path, tmp_path / "run")).metrics if row["kind"] == "event"]
    assert any("part1.safetensors: the" in m and "hold NaN or infinity" in m for m in events)


@pytest.mark.parametrize(
    ("num_samples", "batch", "steps"),
    [(1_281_167, 64, 1_000_000), (32, 8, 2_000), (60_000, 100, 30_000), (61, 1, 3_050)],
)
def test_the_length_comes_from_the_data(num_samples, batch, steps):
    """50 epochs, 2,000 to 1,000,000 steps; on ImageNet in batches of 64 the released million."""
    made = with_length(SemVAETrainingConfig(train=TrainConfig(max_steps=0, global_batch_size=batch)), num_samples)
    assert made.train.max_steps == steps
    assert made.optimizer.warmup_steps == steps // 2000
    assert made.optimizer.decay_start == 8_005 * steps // 10_000  # docs/METHOD.md 2: 500 + 800k of a million
    fixed = replace(made, train=replace(made.train, max_steps=7))
    assert with_length(fixed, num_samples) is fixed
    with pytest.raises(ValueError, match="train.max_steps must be at least 1: only SemVAE takes its length from data"):
        SFDConfig(train=TrainConfig(max_steps=0))


def test_a_job_of_that_length_is_described(tmp_path, data):
    job = semvae_job(config(data, tmp_path / "run", max_steps=0))
    assert job.train.max_steps == job.config.train.max_steps == 2_000


def test_the_authors_feature_files_are_read(tmp_path):
    """patch_tokens (N, tokens, F) in features_NUMBERsamples.safetensors, without flips."""
    tokens = torch.randn(6, 4, 8).half()
    write_shard(tmp_path / "features_6samples.safetensors", {"patch_tokens": tokens, "class_idx": torch.arange(6)})
    shards = FeatureShards(tmp_path)
    assert (len(shards), shards.channels) == (6, 8)
    order = torch.tensor([4, 1])
    assert torch.equal(shards.gather(order, torch.zeros(2, dtype=torch.bool)), tokens[order].float())
    with pytest.raises(ValueError, match="features_6samples.safetensors has no flipped features"):
        shards.require_flips()
