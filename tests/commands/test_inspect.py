"""What `sfd inspect` says of a cache, and the damage it finds."""

import json

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sfd_fast.commands.inspect import InspectConfig, cache_moments, run_inspect
from sfd_fast.data.cache.shards import write_json, write_shard
from sfd_fast.data.load.latents import LatentShards
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.files.digest import file_digest, module_digest


def cache(folder, *, manifest=False):
    """Two shards in the released layout, 4 + 3 channels, 8 x 8; returns the concatenated unflipped latents."""
    g = torch.Generator().manual_seed(0)
    parts = []
    for k, n in enumerate((6, 3)):
        shard = {
            "latents": torch.randn(n, 4, 8, 8, generator=g) * 3 + 1, "latents_sv": torch.randn(n, 3, 8, 8, generator=g),
            "labels": torch.arange(n) % 3,
        }  # fmt: skip
        folder.mkdir(exist_ok=True)
        save_file(shard, folder / f"s{k}.safetensors")
        parts.append(shard)
    if manifest:
        rows = {p.name: {"bytes": p.stat().st_size, "sha256": file_digest(p)} for p in sorted(folder.glob("s*"))}
        write_json(
            folder / "manifest.json",
            {"format": 1, "complete": True, "shards": rows, "settings": {"crop": "adm"}, "semvae_target_cosine": 0.875},
        )
    return {name: torch.cat([part[name] for part in parts]) for name in ("latents", "latents_sv")}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Where the command runs: pictures go there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def lines_of(**options):
    lines = []
    texts = {name: str(options.pop(name)) for name in ("path", "picture") if name in options}
    run_inspect(InspectConfig(**texts, **options), lines.append)
    return "\n".join(lines)


def test_a_released_cache_is_described(tmp_path):
    cache(tmp_path / "c")
    text = lines_of(path=tmp_path / "c")
    assert "9 samples in 2 shards" in text and "3 classes, labels 0 to 2, 3 to 3 samples each" in text
    assert "latents                float32   (4, 8, 8)" in text
    assert "no manifest" in text and "no statistics yet" in text


def test_the_manifest_is_shown(tmp_path):
    cache(tmp_path / "c", manifest=True)
    text = lines_of(path=tmp_path / "c")
    assert "manifest: complete" in text and "crop                 adm" in text
    assert "cosine of `semvae` REPA targets with the true features: 0.8750" in text


def test_statistics_are_exact_and_written_in_the_released_form(tmp_path):
    data = cache(tmp_path / "c")
    text = lines_of(path=tmp_path / "c", statistics=True)
    assert "statistics of 9 samples written" in text
    statistics = LatentStatistics.load(tmp_path / "c")
    reference = data["latents"].double().numpy()
    np.testing.assert_allclose(statistics.texture_mean, reference.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(statistics.texture_std, reference.std((0, 2, 3), ddof=1), rtol=1e-6)
    np.testing.assert_allclose(
        statistics.semantic_std, data["latents_sv"].double().numpy().std((0, 2, 3), ddof=1), rtol=1e-6
    )


def test_statistics_of_other_latents_are_never_overwritten(tmp_path):
    cache(tmp_path / "c")
    foreign = tmp_path / "c" / "latents_sv_stats.pt"
    torch.save({"mean": torch.zeros(1, 8, 1, 1), "std": torch.ones(1, 8, 1, 1)}, foreign)
    before = foreign.read_bytes()
    with pytest.raises(ValueError, match="latents_sv_stats.pt holds statistics of 8 channels, the new ones are of 3"):
        lines_of(path=tmp_path / "c", statistics=True)
    assert foreign.read_bytes() == before and not (tmp_path / "c" / "latents_stats.pt").exists()


def test_statistics_leave_pca_out(tmp_path):
    g = torch.Generator().manual_seed(0)
    shard = {name: torch.randn(5, c, 2, 2, generator=g) for name, c in (("latents", 2), ("latents_dino", 3))}
    write_shard(tmp_path / "c" / "a.safetensors", shard | {"labels": torch.arange(5)})
    lines_of(path=tmp_path / "c", statistics=True)
    assert sorted(p.name for p in (tmp_path / "c").glob("*.pt")) == ["latents_stats.pt"]
    std = shard["latents"].double().numpy().std((0, 2, 3), ddof=1)
    statistics = LatentShards(tmp_path / "c").statistics()
    np.testing.assert_allclose(statistics.texture_std, std, rtol=1e-6)
    assert statistics.semantic_std.tolist() == [1, 1, 1] and statistics.semantic_mean.tolist() == [0, 0, 0]


def test_statistics_have_the_same_bits_for_any_number_of_ranks(tmp_path):
    cache(tmp_path / "c")
    shards = LatentShards(tmp_path / "c")
    whole = cache_moments(shards)

    class Shared:
        """Three ranks in one process: gather returns what all of them would have."""

        def mine(self, count):
            return range(1, count, 3)

        def gather(self, mine):
            return [{k: shards.shard_moments(k) for k in range(r, len(shards.paths), 3)} for r in range(3)]

    shared = cache_moments(shards, Shared())
    for a, b in zip(whole, shared):
        assert torch.equal(a.mean, b.mean) and torch.equal(a.squares, b.squares) and a.count == b.count


def test_verification_finds_a_flipped_bit(tmp_path):
    cache(tmp_path / "c", manifest=True)
    assert "every shard is whole" in lines_of(path=tmp_path / "c", verify=True)
    path = tmp_path / "c" / "s1.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="s1.safetensors: its checksum is not the manifest's"):
        lines_of(path=tmp_path / "c", verify=True)


def test_verification_finds_nan_in_a_released_cache(tmp_path):
    shard = {"latents": torch.zeros(4, 1, 2, 2), "labels": torch.arange(4)}
    shard["latents"][2, 0, 1, 1] = float("nan")
    write_shard(tmp_path / "c" / "a.safetensors", shard)
    with pytest.raises(ValueError, match="a.safetensors: 'latents': sample 2 holds NaN"):
        lines_of(path=tmp_path / "c", verify=True)
    with pytest.raises(ValueError, match="a.safetensors: 'latents': sample 2 holds NaN"):
        lines_of(path=tmp_path / "c", statistics=True)


def test_a_cache_of_features_is_described_and_drawn(tmp_path, here):
    features = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    write_shard(tmp_path / "f" / "a.safetensors", {"feats_dino": features, "labels": torch.arange(2)})
    assert "feats_dino             float16   (6, 3, 3)" in lines_of(path=tmp_path / "f")
    picture = np.asarray(Image.open(here / "inspect-f.png"))
    assert picture.shape == (63, 126, 3) and picture.std() > 20


def test_the_authors_feature_files_are_described_and_drawn(tmp_path, here):
    """patch_tokens and class_idx; where the tokens make no square there is no picture, and that is said."""
    tokens = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0)).half()
    shard = {"patch_tokens": tokens, "class_idx": torch.arange(2)}
    write_shard(tmp_path / "f" / "features_2samples.safetensors", shard)
    text = lines_of(path=tmp_path / "f")
    assert "patch_tokens           float16   (9, 6)" in text and "2 classes, labels 0 to 1" in text
    assert np.asarray(Image.open(here / "inspect-f.png")).shape == (63, 126, 3)
    write_shard(tmp_path / "g" / "a.safetensors", {"patch_tokens": tokens[:, :7].contiguous()})
    assert "no picture: 7 tokens are no square" in lines_of(path=tmp_path / "g")


@pytest.mark.parametrize("tensors", [{}, {"x": torch.zeros(())}, {"weight": torch.zeros(3, 4)}])
def test_what_is_no_cache_is_named(tmp_path, tensors):
    (tmp_path / "c").mkdir()
    save_file(tensors, tmp_path / "c" / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors has no tensor '\w+', it holds"):
        lines_of(path=tmp_path / "c")


def test_the_picture_shows_decoded_images_above_semantics(tmp_path):
    """Pixel-space texture of one black and one white image: the first row is they."""
    from sfd_fast.formats.texture import save_codec
    from sfd_fast.models.texture import IdentityCodec

    save_codec(tmp_path / "codec", IdentityCodec(3))
    texture = torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 1.0)])
    shard = {"latents": texture, "latents_sv": torch.randn(2, 5, 8, 8), "labels": torch.arange(2)}
    write_shard(tmp_path / "c" / "a.safetensors", shard)
    lines_of(path=tmp_path / "c", picture=tmp_path / "p.png", texture_codec=str(tmp_path / "codec"))
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert picture.shape == (128, 128, 3)
    assert (picture[:64, :64] == 0).all() and (picture[:64, 64:] == 255).all()
    assert picture[64:].std() > 20


def test_a_picture_is_drawn_where_the_command_runs_and_the_cache_is_not_touched(tmp_path, here):
    cache(tmp_path / "c", manifest=True)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "c").iterdir())
    text = lines_of(path=tmp_path / "c")
    assert f"picture: {here / 'inspect-c.png'}" in text
    assert "no manifest tells the texture codec: the picture shows principal components; --texture_codec PATH" in text
    assert Image.open(here / "inspect-c.png").size == (8 * 64, 2 * 64)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "c").iterdir()) == before
    (here / "inspect-c.png").unlink()
    assert "picture:" not in lines_of(path=tmp_path / "c", picture="none")
    assert list(here.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_a_clear_error(tmp_path):
    cache(tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*file/p.png: .*name another file with --picture, or none"):
        lines_of(path=tmp_path / "c", picture=tmp_path / "file" / "p.png")


def test_the_codec_of_the_manifest_decodes_the_picture_while_it_is_the_same(tmp_path, here):
    from sfd_fast.formats.texture import save_codec
    from sfd_fast.models.texture import IdentityCodec

    codec = tmp_path / "codec"
    save_codec(codec, IdentityCodec(3))
    texture = torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 1.0)])
    write_shard(tmp_path / "c" / "a.safetensors", {"latents": texture, "labels": torch.arange(2)})
    path = tmp_path / "c" / "a.safetensors"
    rows = {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}}
    settings = {"texture_codec": module_digest(IdentityCodec(3))}
    manifest = {"format": 1, "complete": True, "shards": rows, "settings": settings}
    write_json(tmp_path / "c" / "manifest.json", manifest | {"sources": {"texture_codec": str(codec)}})
    text = lines_of(path=tmp_path / "c")
    assert f"decoded with the cache's own texture codec, {codec}" in text and f"texture_codec from   {codec}" in text
    picture = np.asarray(Image.open(here / "inspect-c.png"))
    assert (picture[:, :64] == 0).all() and (picture[:, 64:] == 255).all()
    components = "the picture shows principal components"
    assert components in lines_of(path=tmp_path / "c", texture_codec="none")
    write_json(tmp_path / "c" / "manifest.json", manifest | {"sources": {"texture_codec": str(tmp_path / "gone")}})
    assert f"the texture codec is not at {tmp_path / 'gone'} any more: {components}" in lines_of(path=tmp_path / "c")
    other = manifest | {"sources": {"texture_codec": str(codec)}, "settings": {"texture_codec": "0" * 64}}
    write_json(tmp_path / "c" / "manifest.json", other)
    assert f"{codec} is not the texture codec any more that made the cache: {components}" in lines_of(
        path=tmp_path / "c"
    )


def test_a_codec_of_other_latents_is_refused(tmp_path):
    from sfd_fast.formats.texture import save_codec
    from sfd_fast.models.texture import IdentityCodec

    save_codec(tmp_path / "codec", IdentityCodec(3))
    cache(tmp_path / "c")
    with pytest.raises(ValueError, match="the texture codec has 3 latent channels, the cache 4"):
        lines_of(path=tmp_path / "c", texture_codec=str(tmp_path / "codec"))


def test_a_picture_without_a_codec_shows_structure(tmp_path):
    cache(tmp_path / "c")
    lines_of(path=tmp_path / "c", picture=tmp_path / "p.png", num_images=3)
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert picture.shape == (128, 192, 3) and picture[:64].std() > 20


def test_foreign_and_unfinished_shards_are_refused(tmp_path):
    cache(tmp_path / "c", manifest=True)
    shard = {"latents": torch.zeros(1, 4, 8, 8), "latents_sv": torch.zeros(1, 3, 8, 8), "labels": torch.arange(1)}
    write_shard(tmp_path / "c" / "z.safetensors", shard)
    with pytest.raises(ValueError, match="z.safetensors is not listed in .*manifest.json"):
        lines_of(path=tmp_path / "c")
    (tmp_path / "c" / "z.safetensors").unlink()
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    write_json(tmp_path / "c" / "manifest.json", manifest | {"complete": False})
    with pytest.raises(ValueError, match="is an unfinished cache"):
        lines_of(path=tmp_path / "c")


def test_a_remote_cache_is_inspected_through_its_local_copy(tmp_path):
    filesystem = fsspec.filesystem("memory")
    cache(tmp_path / "c", manifest=True)
    filesystem.put(str(tmp_path / "c"), "/inspected/c", recursive=True)
    try:
        with pytest.raises(ValueError, match="is remote: name a local folder"):
            lines_of(path="memory://inspected/c")
        text = lines_of(path="memory://inspected/c", cache_folder=str(tmp_path / "local"), verify=True, picture="none")
    finally:
        filesystem.rm("/inspected", recursive=True)
    assert "9 samples in 2 shards" in text and "every shard is whole" in text


def test_shards_may_be_given_one_by_one(tmp_path):
    cache(tmp_path / "c")
    assert "3 samples in 1 shards" in lines_of(path=tmp_path / "c" / "s1.safetensors")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path / 'nowhere'} does not exist"):
        lines_of(path=tmp_path / "nowhere")
