"""The whole chain through the command line: a folder of real photographs becomes a model that generates images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.image_trees import write_tree
from harness.tiny_encoders import save_autoencoder, save_dinov2
from PIL import Image
from safetensors.torch import load_file

from sfd_fast import cli
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.models.texture import DiffusersCodec

COUNTS = {"china": 7, "flower": 6, "hopper": 5}


def sfd(command, **flags):
    """`sfd COMMAND --key value ...`; keys with a dot are written with two underscores."""
    cli.main([command, *(word for key, value in flags.items() for word in (f"--{key.replace('__', '.')}", str(value)))])


TRAINING = {"run__log_every": 1, "run__tensorboard": "false", "train__precision": "fp32"}


def run_of(root, **changes):
    """The flags of the transformer's run on the cache below root."""
    return TRAINING | {
        "run__out": root / "run", "train__max_steps": 3, "train__global_batch_size": 6, "run__validate_every": 3,
        "run__sample_every": 3, "run__num_sample_images": 4, "data__path": root / "latents",
        "data__validation_samples": 3, "data__targets": "semvae", "data__semvae": root / "semvae" / "model",
        "data__texture_codec": root / "codec", "model__hidden_size": 32, "model__depth": 2, "model__num_heads": 2,
        "model__grid_size": 8, "model__texture_channels": 4, "model__semantic_channels": 3, "model__num_classes": 3,
        "model__repa_channels": 24, "model__repa_depth": 1, "model__repa_hidden": 16, "sampler__num_inference_steps": 3,
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder in which every command but `sample` has run."""
    root = tmp_path_factory.mktemp("chain")
    images = write_tree(root / "tree", COUNTS)
    vfm, codec = save_dinov2(root / "vfm"), save_autoencoder(root / "codec")
    preparing = {"images": images, "vfm": vfm, "image_size": 32, "shard_size": 4, "num_threads": 1, "device": "cpu"}
    sfd("features", **preparing, out=root / "features", grid_size=8)
    sfd(
        "train-semvae", **TRAINING, run__out=root / "semvae", train__max_steps=4, train__global_batch_size=6,
        run__validate_every=4, data__path=root / "features", data__validation_samples=3,
        semvae__feature_channels=24, semvae__hidden_size=24, semvae__num_heads=2, semvae__encoder_depth=1,
        semvae__decoder_depth=1, semvae__latent_channels=3,
    )  # fmt: skip
    sfd("encode", **preparing, out=root / "latents", texture_codec=codec, semvae=root / "semvae" / "model")
    sfd("train", **run_of(root))
    return root


def test_every_image_is_in_both_caches(made):
    for name in ("features", "latents"):
        manifest = json.loads((made / name / "manifest.json").read_text())
        assert manifest["complete"] and manifest["count"] == sum(COUNTS.values())
        assert manifest["class_counts"] == list(COUNTS.values())


def test_both_networks_train_and_validate(made):
    for name, terms in (("semvae", ("mse", "cosine", "kl")), ("run", ("velocity", "cosine", "repa"))):
        rows = [json.loads(line) for line in (made / name / "metrics.jsonl").read_text().splitlines()]
        for kind in ("train", "validation"):
            found = [row for row in rows if row["kind"] == kind]
            assert found and all(np.isfinite([row[term] for term in terms]).all() for row in found)
    assert Image.open(made / "run" / "samples" / "00000003.png").size == (64, 64)


def test_images_come_out_decoded_with_the_statistics_of_the_cache(made, tmp_path, monkeypatch):
    denormalize, decode = LatentStatistics.denormalize_texture, DiffusersCodec.decode
    normalised, decoded = [], []

    def watched_denormalize(self, texture):
        normalised.append(texture.clone())
        return denormalize(self, texture)

    def watched_decode(self, latents):
        decoded.append((latents, decode(self, latents)))
        return decoded[-1][1]

    monkeypatch.setattr(LatentStatistics, "denormalize_texture", watched_denormalize)
    monkeypatch.setattr(DiffusersCodec, "decode", watched_decode)
    sfd("sample", model=made / "run" / "model", out=tmp_path / "images", num_images=6, device="cpu", progress="false")

    shards = [load_file(path)["latents"] for path in sorted((made / "latents").glob("shard-*.safetensors"))]
    latents = torch.cat(shards).double().numpy()
    mean, std = (f(axis=(0, 2, 3), keepdims=True) for f in (latents.mean, lambda **k: latents.std(ddof=1, **k)))
    assert len(normalised) == len(decoded) == 1
    np.testing.assert_allclose(decoded[0][0], normalised[0].double().numpy() * std + mean, rtol=1e-5, atol=1e-5)
    pictures = sorted(Path(tmp_path, "images", "images").iterdir())
    assert len(pictures) == 6
    shown = np.stack([np.asarray(Image.open(path)) for path in pictures])
    expected = (127.5 * decoded[0][1][:6] + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert shown.shape == (6, 32, 32, 3) and np.array_equal(shown, expected)
    assert len({picture.tobytes() for picture in shown}) == 6


def test_a_run_that_names_no_codec_is_sampled_as_it_is_by_the_names_of_its_folders(made, tmp_path):
    """The codec that made the cache goes with the model, and so do the names of the class folders."""
    sfd("train", **run_of(made, data__texture_codec="", run__out=tmp_path / "run", run__sample_every=0))
    names = list(COUNTS)
    out = {"device": "cpu", "progress": "false", "num_inference_steps": 3}
    sfd("sample", model=tmp_path / "run", out=tmp_path / "images", labels=f"{names[2]},{names[0]}", **out)
    assert np.load(tmp_path / "images" / "labels.npy").tolist() == [2, 0]
    sfd("sample", model=made / "run", out=tmp_path / "same", labels="2,0", **out)
    ours, theirs = (sorted((tmp_path / name / "images").iterdir()) for name in ("images", "same"))
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


def test_another_offset_is_sampled_with_a_warning_and_recorded(made, tmp_path, caplog):
    sfd("sample", model=made / "run", out=tmp_path, num_images=2, device="cpu", progress="false", delta_t=0.2)
    assert "sampling with delta_t 0.2: the model was trained with 0.3" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["delta_t"] == 0.2


def test_statistics_of_another_cache_are_refused_when_sampling(made, tmp_path):
    """A pipeline folder whose statistics were replaced: exit code 1, nothing is drawn."""
    from sfd_fast.sampling.pipeline import SFDPipeline

    SFDPipeline.from_pretrained(made / "run" / "model", device="cpu").save_pretrained(tmp_path / "pipeline")
    LatentStatistics.identity(4, 3).save(tmp_path / "pipeline" / "statistics")
    with pytest.raises(SystemExit, match="1"):
        sfd("sample", model=tmp_path / "pipeline", out=tmp_path / "images", num_images=2, device="cpu")
    assert not list((tmp_path / "images").rglob("*.png"))
