"""Preparing a small tree of real photographs with tiny encoders that transformers and diffusers saved."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.image_trees import crops, encoded, photographs, write_tree
from harness.marks import needs_dali
from harness.tiny_caches import GRID, SIZE, encode_config, features_config, stored
from harness.tiny_encoders import save_dinov2
from PIL import Image

from sfd_fast.commands.encode import run_encode
from sfd_fast.commands.features import FeaturesConfig, run_features
from sfd_fast.data.encode.job import located
from sfd_fast.data.images import screening
from sfd_fast.data.images.decode import square
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.data.load.loader import LatentLoader
from sfd_fast.diffusion import random_numbers
from sfd_fast.diffusion.transport import noise

pytest_plugins = ["harness.cache_fixtures"]


def test_each_image_is_encoded_once_in_order(parts, encoded_cache):
    tensors = stored(encoded_cache)
    assert tensors["labels"].tolist() == [0] * 5 + [1] * 4 + [2] * 4
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    both = lambda name, c: {name: (13, c, GRID, GRID), f"{name}_flip": (13, c, GRID, GRID)}  # noqa: E731
    assert shapes == {"labels": (13,)} | both("latents", 4) | both("latents_sv", 3) | both("feats_dino", 24)
    assert tensors["feats_dino"].dtype == torch.float16
    assert len({row.numpy().tobytes() for row in tensors["latents"]}) == 13


@pytest.mark.parametrize("flip", [False, True])
def test_latents_are_what_the_libraries_compute(parts, encoded_cache, flip):
    """Image 11 through PIL, diffusers and transformers by hand, with the noise of (seed, image number)."""
    from diffusers import AutoencoderKL
    from transformers import Dinov2WithRegistersModel

    from sfd_fast.formats.released_model import load_semvae

    path = sorted(Path(parts["images"], "hopper").iterdir())[2]
    pixels = np.asarray(square(Image.open(path).convert("RGB"), SIZE)).astype(np.float32) / 255
    pixels = torch.from_numpy(pixels[:, ::-1].copy() if flip else pixels).permute(2, 0, 1)[None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    suffix, ids = "_flip" if flip else "", torch.tensor([11])
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(parts["texture_codec"]).encode(2 * pixels - 1).latent_dist
        resized = torch.nn.functional.interpolate(
            (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1), (112, 112), mode="bicubic"
        )
        features = Dinov2WithRegistersModel.from_pretrained(parts["vfm"])(resized).last_hidden_state[:, 5:]
        sem_mean, sem_logvar = load_semvae(parts["semvae"]).encode(features)
    tex_noise = noise(ids, (4, 8, 8), 0, random_numbers.CODEC_NOISE if flip else random_numbers.TEXTURE_POSTERIOR)
    semantic = random_numbers.SEMANTIC_FLIP_NOISE if flip else random_numbers.SEMANTIC_POSTERIOR
    sem_noise = noise(ids, (3, 8, 8), 0, semantic)
    grid = lambda tokens: tokens.transpose(1, 2).reshape(1, -1, 8, 8)  # noqa: E731
    tensors = stored(encoded_cache)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(tensors[f"latents{suffix}"][11:12], posterior.mean + posterior.std * tex_noise, **close)
    semantic = grid(sem_mean) + (0.5 * grid(sem_logvar)).exp() * sem_noise
    torch.testing.assert_close(tensors[f"latents_sv{suffix}"][11:12], semantic, **close)
    torch.testing.assert_close(tensors[f"feats_dino{suffix}"][11:12].float(), grid(features), rtol=2e-3, atol=2e-3)


def test_statistics_equal_numpy_in_float64(encoded_cache):
    manifest = json.loads((encoded_cache / "manifest.json").read_text())
    tensors, files = stored(encoded_cache), {"texture": "latents", "semantic": "latents_sv"}
    for stream, name in files.items():
        data = tensors[name].double().numpy()
        np.testing.assert_allclose(manifest["statistics"][stream]["mean"], data.mean((0, 2, 3)), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(manifest["statistics"][stream]["std"], data.std((0, 2, 3), ddof=1), rtol=1e-9)
        file = torch.load(encoded_cache / f"{name}_stats.pt")
        np.testing.assert_allclose(file["std"].flatten(), data.std((0, 2, 3), ddof=1), rtol=1e-6)


def test_the_manifest_tells_what_the_cache_is(encoded_cache):
    import hashlib

    manifest = json.loads((encoded_cache / "manifest.json").read_text())
    assert manifest["complete"] and manifest["count"] == 13
    assert manifest["classes"] == ["china", "flower", "hopper"] and manifest["class_counts"] == [5, 4, 4]
    for name, row in manifest["shards"].items():
        data = (encoded_cache / name).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest() and row["bytes"] == len(data)
    assert sum(row["count"] for row in manifest["shards"].values()) == 13
    assert not list(encoded_cache.glob("*.json.*")) and len(list(encoded_cache.glob("*.json"))) == 1


def test_the_manifests_cosine_is_that_of_decoded_and_true_features(parts, encoded_cache):
    from sfd_fast.formats.released_model import load_semvae

    tensors, semvae, cosines = stored(encoded_cache), load_semvae(parts["semvae"]), []
    tokens = lambda grid: grid.float().flatten(2).transpose(1, 2)  # noqa: E731
    for suffix in ("", "_flip"):
        with torch.no_grad():
            decoded = semvae.decode(tokens(tensors[f"latents_sv{suffix}"]))
        true = tokens(tensors[f"feats_dino{suffix}"])
        cosines.append(torch.nn.functional.cosine_similarity(decoded, true, dim=-1).mean().item())
    manifest = json.loads((encoded_cache / "manifest.json").read_text())
    assert manifest["semvae_target_cosine"] == pytest.approx(np.mean(cosines), abs=1e-4)


def test_the_cache_trains(encoded_cache):
    batch = next(iter(LatentLoader(LatentShards(encoded_cache), 13, seed=0, flip=False)))
    assert batch["latents"].shape == (13, 7, GRID, GRID)
    assert batch["latents"].mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (batch["latents"].std(dim=(0, 2, 3)) - 1).abs().max() < 1e-4


def test_the_manifest_tells_where_images_and_encoders_were(parts, encoded_cache):
    sources = json.loads((encoded_cache / "manifest.json").read_text())["sources"]
    assert sources == {name: parts[name] for name in ("images", "vfm", "semvae", "texture_codec")}
    assert located("dinov2-b") == "dinov2-b"


@needs_dali
def test_dali_encodes_each_image_once_and_counts_no_failure(parts, tmp_path, capsys):
    """Against PIL: image by image the same semantics, but for the difference of the crop."""
    for decoder in ("pil", "dali"):
        run_encode(encode_config(parts, tmp_path / decoder, decoder=decoder))
    manifest = json.loads((tmp_path / "dali" / "manifest.json").read_text())
    assert manifest["dali_failures"] == 0 and manifest["settings"]["decoder"] == "dali"
    exact, close = stored(tmp_path / "pil"), stored(tmp_path / "dali")
    assert torch.equal(exact["labels"], close["labels"])
    distance = torch.cdist(close["latents"].flatten(1), exact["latents"].flatten(1))
    assert distance.argmin(1).tolist() == list(range(13)) and distance.diag().max() > 0
    assert "because DALI failed" not in capsys.readouterr().out


@needs_dali
def test_failures_of_dali_are_counted_in_manifest_and_summary(parts, tmp_path, capsys, caplog, monkeypatch):
    """A GIF that the index calls plain: DALI gives up its batch, PIL decodes it, and the image is named."""
    tree = write_tree(tmp_path / "tree", {"china": 6})
    (tree / "china" / "001.jpg").write_bytes(encoded(crops("china", 2)[1], "gif"))
    out = tmp_path / "out"
    monkeypatch.setattr(screening, "is_plain", lambda data: True)
    run_encode(encode_config(parts | {"images": str(tree)}, out, decoder="dali"))
    assert json.loads((out / "manifest.json").read_text())["dali_failures"] == 1
    assert "1 batches were decoded with PIL because DALI failed in them" in capsys.readouterr().out
    assert "the cause is" in caplog.text and "china/001.jpg" in caplog.text
    assert len(stored(out)["labels"]) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image_size": 64}, "image_size is 32 there, 64 now"), ({"flip": False}, "flip is True there, False now"),
     ({"seed": 1}, "seed is 0 there, 1 now"), ({"storage": "bf16"}, "storage is 'fp32' there")],
)  # fmt: skip
def test_other_settings_are_refused_and_named(parts, encoded_cache, change, message):
    with pytest.raises(ValueError, match=f"holds a cache of other settings: .*{message}"):
        run_encode(replace(encode_config(parts, encoded_cache, features=True), **change))


def test_another_encoder_is_refused(parts, encoded_cache, tmp_path):
    other = save_dinov2(tmp_path / "vfm", seed=1)
    with pytest.raises(ValueError, match="holds a cache of other settings: vfm is"):
        run_encode(encode_config(parts | {"vfm": str(other)}, encoded_cache, features=True))


def test_moments_are_stored_and_sampled_by_the_loader(parts, tmp_path):
    config = encode_config(parts, tmp_path / "out", posterior="moments", storage="fp32")
    run_encode(config)
    tensors = stored(tmp_path / "out")
    assert {"latents_mean", "latents_logvar_flip"} <= tensors.keys() and "latents" not in tensors
    mean, logvar = tensors["latents_mean"].double(), tensors["latents_logvar"].double()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    variance = mean.var(dim=(0, 2, 3), correction=1) + logvar.exp().mean(dim=(0, 2, 3))
    np.testing.assert_allclose(manifest["statistics"]["texture"]["std"], variance.sqrt(), rtol=1e-3)
    loader = LatentLoader(LatentShards(tmp_path / "out"), 13, seed=3, flip=False)
    batches = [batch for _, batch in zip(range(2), loader)]
    for batch in batches:
        index = loader.indices(batch["sample_ids"])
        eps = noise(batch["sample_ids"], (4, 8, 8), 3, random_numbers.TEXTURE_POSTERIOR)
        texture = mean[index].float() + (0.5 * logvar[index]).exp().float() * eps
        expected = loader.statistics.normalize(texture, tensors["latents_sv"][index])
        torch.testing.assert_close(batch["latents"], expected, rtol=1e-4, atol=1e-4)
    assert (batches[0]["sample_ids"] != batches[1]["sample_ids"]).all()


def test_features_alone_have_the_released_layout(parts, tmp_path):
    run_features(features_config(parts, tmp_path / "out", shard_size=6))
    tensors = stored(tmp_path / "out")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "feats_dino": ((13, 24, GRID, GRID), torch.float16),
        "feats_dino_flip": ((13, 24, GRID, GRID), torch.float16),
        "labels": ((13,), torch.int64),
    }


def test_released_semvae_features_use_its_own_crop(parts, tmp_path):
    """Resize 256, crop 224, in this ratio; no flips."""
    config = FeaturesConfig(
        images=parts["images"], vfm=parts["vfm"], out=str(tmp_path / "out"), image_size=28, grid_size=2, crop="resize",
        flip=False, num_threads=1, device="cpu", storage="fp32",
    )  # fmt: skip
    run_features(config)
    tensors = stored(tmp_path / "out")
    from sfd_fast.data.images.decode import square, to_tensor
    from sfd_fast.models.vfm import load_vfm

    image = Image.open(sorted(Path(parts["images"], "china").iterdir())[0]).convert("RGB")
    features = load_vfm(parts["vfm"], grid_size=2).features(to_tensor(square(image, 28, "resize"))[None])
    torch.testing.assert_close(
        tensors["feats_dino"][:1], features.transpose(1, 2).reshape(1, 24, 2, 2), rtol=1e-4, atol=1e-4
    )
    assert set(tensors) == {"feats_dino", "labels"}


def test_a_damaged_image_is_skipped_or_fatal_as_configured(parts, tmp_path):
    tree = write_tree(tmp_path / "tree", {"china": 3, "flower": 2})
    whole = (tree / "china" / "001.jpg").read_bytes()
    (tree / "china" / "001.jpg").write_bytes(whole[: len(whole) // 2])
    config = encode_config(parts | {"images": str(tree)}, tmp_path / "out")
    run_encode(config)
    assert stored(tmp_path / "out")["labels"].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="1 images are unreadable, the first is .*001.jpg"):
        run_encode(replace(config, out=str(tmp_path / "other"), on_bad="fail"))


def test_values_that_are_not_finite_name_the_image(parts, tmp_path):
    """fp16 overflows where a codec gives large latents: an error, never an infinite cache."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(parts["texture_codec"])
    with torch.no_grad():
        model.quant_conv.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "codec")
    config = encode_config(parts | {"texture_codec": str(tmp_path / "codec")}, tmp_path / "out", storage="fp16")
    with pytest.raises(ValueError, match="shard-00000.safetensors: 'latents' of .*china/000.jpg holds NaN"):
        run_encode(config)


def test_a_full_disk_names_the_shard(parts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    from sfd_fast.data.images import opening
    from sfd_fast.files import atomic

    opening.open_index(parts["images"], tmp_path / "out" / "index", report=lambda _: None)
    monkeypatch.setattr(atomic.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="cannot write .*shard-00000.safetensors .*No space left"):
        run_encode(encode_config(parts, tmp_path / "out"))


def test_parts_that_do_not_fit_are_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="features of width 24, the VFM gives 16"):
        run_encode(encode_config(parts | {"vfm": str(save_dinov2(tmp_path / "v", width=16))}, tmp_path / "out"))
    with pytest.raises(ValueError, match="image_size 30 must be a multiple of the codec's downsampling, 4"):
        run_encode(encode_config(parts, tmp_path / "out", image_size=30))
    with pytest.raises(ValueError, match="texture_codec is empty: this command needs --images, --texture_codec"):
        run_encode(encode_config(parts | {"texture_codec": ""}, tmp_path / "out"))


def test_unusual_files_are_encoded_as_pil_shows_them(parts, tmp_path):
    image = photographs()["china"].resize((50, 40))
    folder = tmp_path / "tree" / "odd"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(encoded(image, "png"))
    (folder / "1.webp").write_bytes(encoded(image, "webp", lossless=True))
    (folder / "2.gif").write_bytes(encoded(image, "gif"))
    run_encode(encode_config(parts | {"images": str(tmp_path / "tree")}, tmp_path / "out"))
    latents = stored(tmp_path / "out")["latents_sv"]
    assert len(latents) == 3 and not torch.equal(latents[1], latents[2])


def test_texture_alone_needs_no_vfm_and_pixels_need_no_codec(parts, tmp_path, capsys):
    """Pixel space by its name: what is stored is the released crop in [-1, 1], 2 x 2 pixels a token."""
    config = encode_config(parts, tmp_path / "out", semvae="", vfm="/nowhere", texture_codec="pixels:2", flip=False)
    run_encode(config)
    tensors = stored(tmp_path / "out")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"latents": (13, 12, 16, 16), "labels": (13,)}
    path = sorted(Path(parts["images"], "china").iterdir())[0]
    pixels = torch.from_numpy(np.asarray(square(Image.open(path).convert("RGB"), SIZE)).copy()).float() / 127.5 - 1
    folded = pixels.view(16, 2, 16, 2, 3).permute(4, 1, 3, 0, 2).reshape(12, 16, 16)
    torch.testing.assert_close(tensors["latents"][0], folded, rtol=0, atol=1e-5)
    shards = LatentShards(tmp_path / "out")
    assert (shards.texture_channels, shards.semantic_channels) == (12, 0)
    assert next(iter(LatentLoader(shards, 4, seed=0, flip=False)))["latents"].shape == (4, 12, 16, 16)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*")}
    run_encode(config)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*")} == before


def test_another_size_of_pixel_space_is_another_codec(parts, tmp_path):
    config = encode_config(parts, tmp_path / "out", semvae="", texture_codec="pixels:2", flip=False)
    run_encode(config)
    with pytest.raises(ValueError, match="holds a cache of other settings: texture_codec is"):
        run_encode(replace(config, texture_codec="pixels:4"))


def test_transparency_and_rotation_are_counted_and_the_preset_reads_as_released(parts, tmp_path, capsys):
    folder = tmp_path / "tree" / "a"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "png"))
    parts = {"images": str(tmp_path / "tree"), "texture_codec": "pixels"}
    texts = {}
    for background in ("white", "blue", "released"):
        run_encode(encode_config(parts, tmp_path / background, background=background, flip=False))
        texts[background] = capsys.readouterr().out
        pixel = (stored(tmp_path / background)["latents"][0, :, 0, 0] + 1) * 127.5
        assert pixel.round().tolist() == {"white": [255] * 3, "blue": [0, 0, 255], "released": [255, 0, 0]}[background]
    assert "images 1 transparent: turned, put on blue, scaled to 8 bits (--background)" in texts["blue"]
    assert "images 1 transparent: read as the released trainers do" in texts["released"]


def test_flips_are_off_unless_they_are_asked_for(tmp_path):
    from sfd_fast import cli

    flags = ["--images", str(tmp_path), "--texture_codec", "pixels"]
    assert not cli.parse("encode", flags).flip
    released = cli.parse("encode", [*flags, "--preset", "imagenet256"])
    assert released.flip and released.background == "released" and released.storage == "fp32"


def test_one_command_at_a_time_in_a_folder(parts, tmp_path):
    from sfd_fast.files.lock import FolderLock

    message = "out is in use by `sfd encode`.*choose another folder with --out"
    lock = FolderLock(tmp_path / "out", command="sfd encode", advice="x")
    with lock, pytest.raises(BlockingIOError, match=message):
        run_encode(encode_config(parts, tmp_path / "out"))


def test_the_shards_of_a_new_cache_are_small_on_a_cpu_and_a_begun_one_keeps_its_size(parts, tmp_path):
    config = encode_config(parts, tmp_path / "out", semvae="", texture_codec="pixels", flip=False)
    run_encode(replace(config, shard_size=5))
    run_encode(replace(config, shard_size=0))
    assert len(list((tmp_path / "out").glob("shard-*"))) == 3
    run_encode(replace(config, shard_size=0, out=str(tmp_path / "new")))
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["settings"]["shard_size"] == 64


@pytest.fixture
def pixels(tmp_path):
    """Settings that need no encoder, and an output folder that is there already."""
    (tmp_path / "out").mkdir()
    write_tree(tmp_path / "tree", {"china": 3})
    parts = {"images": str(tmp_path / "tree"), "texture_codec": "pixels"}
    return encode_config(parts, tmp_path / "out", flip=False), tmp_path / "out"


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "weights.safetensors", "latents_stats.pt"])
def test_files_of_others_are_never_overwritten(pixels, name):
    config, out = pixels
    (out / name).write_bytes(b"of someone")
    with pytest.raises(ValueError, match=f"{name} was not written by this command, so its folder is left alone"):
        run_encode(config)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_bytes() == b"of someone"


def test_shards_of_ours_without_their_manifest_give_way(pixels):
    """Fewer shards than before: those that are too many go."""
    config, out = pixels
    run_encode(replace(config, shard_size=1))
    (out / "manifest.json").unlink()
    (out / "thesis.txt").write_text("of someone, in nobody's way")
    run_encode(replace(config, shard_size=2))
    assert sorted(path.name for path in out.glob("shard-*")) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert len(LatentShards(out)) == 3 and (out / "thesis.txt").exists()


@pytest.mark.parametrize("inside", [".", "cache", "china/cache"])
def test_a_cache_among_the_images_is_refused(pixels, tmp_path, inside):
    config, _ = pixels
    place = tmp_path / "tree" / inside
    with pytest.raises(ValueError, match="lies among the images of .*choose another folder"):
        run_encode(replace(config, out=str(place)))
    run_encode(config)
