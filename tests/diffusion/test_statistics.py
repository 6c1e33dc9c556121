"""Statistics against NumPy in float64, and the normalisation that they define."""

import numpy as np
import pytest
import torch

from sfd_fast.diffusion.statistics import ChannelMoments, LatentStatistics, merge_all


def data(n=700, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    scale = torch.tensor([1.0, 30.0, 0.01]).view(3, 1, 1)
    return (torch.randn(n, 3, 4, 5, generator=g) * scale + torch.tensor([0.0, 1000.0, -3.0]).view(3, 1, 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_moments_equal_numpy_in_float64(dtype):
    values = data(dtype=dtype)
    moments = merge_all(ChannelMoments.of(part, chunk=33) for part in values.split(150))
    reference = values.double().numpy()
    np.testing.assert_allclose(moments.mean, reference.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.std(), reference.std(axis=(0, 2, 3), ddof=1), rtol=1e-12)
    assert moments.count == values.numel() // 3


def test_moments_survive_json_exactly():
    import json

    moments = ChannelMoments.of(data())
    read = ChannelMoments.from_json(json.loads(json.dumps(moments.to_json())))
    assert torch.equal(read.mean, moments.mean) and torch.equal(read.squares, moments.squares)
    assert read.count == moments.count


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_an_error_that_names_the_sample(bad):
    values = data()
    values[345, 1, 2, 2] = bad
    with pytest.raises(ValueError, match="sample 345 holds NaN"):
        ChannelMoments.of(values, chunk=100)


def random_statistics(multiplier=1.0):
    g = torch.Generator().manual_seed(2)
    r = lambda n: torch.rand(n, generator=g) + 0.5  # noqa: E731
    return LatentStatistics(r(3), r(3), r(2), r(2), multiplier)


def test_normalise_is_the_formula_with_texture_first():
    statistics = random_statistics(0.18215)
    texture, semantic = torch.randn(4, 3, 2, 2), torch.randn(4, 2, 2, 2)
    out = statistics.normalize(texture, semantic)
    expected_texture = (texture - statistics.texture_mean.view(3, 1, 1)) / statistics.texture_std.view(3, 1, 1)
    expected_semantic = (semantic - statistics.semantic_mean.view(2, 1, 1)) / statistics.semantic_std.view(2, 1, 1)
    torch.testing.assert_close(out[:, :3], expected_texture * 0.18215)
    torch.testing.assert_close(out[:, 3:], expected_semantic * 0.18215)


def test_denormalise_inverts_normalise():
    statistics = random_statistics(0.7)
    texture, semantic = torch.randn(4, 3, 2, 2), torch.randn(4, 2, 2, 2)
    out = statistics.normalize(texture, semantic)
    torch.testing.assert_close(statistics.denormalize_texture(out[:, :3]), texture)
    torch.testing.assert_close(statistics.denormalize_semantic(out[:, 3:]), semantic)


def test_normalised_data_has_mean_zero_and_std_one():
    values = data()
    moments = ChannelMoments.of(values)
    statistics = LatentStatistics.from_moments(moments, ChannelMoments.of(values[:, :1]))
    out = statistics.normalize(values, values[:, :1])
    assert out.mean(dim=(0, 2, 3)).abs().max() < 1e-3  # fp32 at a mean of 100000 stds would lose more
    assert (out.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3


def test_low_precision_latents_are_normalised_in_fp32():
    statistics = random_statistics()
    texture, semantic = torch.randn(4, 3, 2, 2).bfloat16(), torch.randn(4, 2, 2, 2).bfloat16()
    out = statistics.normalize(texture, semantic)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, statistics.normalize(texture.float(), semantic.float()))


def test_saved_files_have_the_released_form(tmp_path):
    statistics = random_statistics()
    statistics.save(tmp_path)
    file = torch.load(tmp_path / "latents_sv_stats.pt", weights_only=True)
    assert set(file) == {"mean", "std"} and file["mean"].shape == file["std"].shape == (1, 2, 1, 1)
    read = LatentStatistics.load(tmp_path, 2.0)
    assert torch.equal(read.texture_std, statistics.texture_std) and read.multiplier == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latents_stats.pt", "latents_sv_stats.pt"]


def test_missing_statistics_are_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="latents_stats.pt is missing"):
        LatentStatistics.load(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "text", "another"])
def test_damaged_statistics_are_an_error_that_names_the_file(tmp_path, damage):
    random_statistics().save(tmp_path)
    path = tmp_path / "latents_sv_stats.pt"
    if damage == "another":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(path.read_bytes()[:300] if damage == "truncated" else b"mean: 0")
    with pytest.raises(ValueError, match="latents_sv_stats.pt is truncated, damaged or no file.*sfd inspect"):
        LatentStatistics.load(tmp_path)


def test_a_constant_channel_and_foreign_latents_are_errors():
    with pytest.raises(ValueError, match="texture_std of channel 1 is 0.0"):
        LatentStatistics(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="texture latents have 4 channels, their statistics 3"):
        random_statistics().normalize(torch.ones(1, 4, 2, 2), torch.ones(1, 2, 2, 2))


def test_parts_that_are_not_standardised_have_zero_and_one():
    statistics = LatentStatistics(torch.randn(3), torch.rand(3) + 1, torch.randn(2), torch.rand(2) + 1, 0.7)
    texture_only = statistics.standardising(texture=True, semantic=False)
    assert torch.equal(texture_only.texture_mean, statistics.texture_mean) and texture_only.multiplier == 0.7
    assert torch.equal(texture_only.semantic_mean, torch.zeros(2))
    assert torch.equal(texture_only.semantic_std, torch.ones(2))
    latents = torch.randn(4, 5, 2, 2)
    plain = statistics.standardising(texture=False, semantic=False)
    torch.testing.assert_close(plain.normalize(latents[:, :3], latents[:, 3:]), 0.7 * latents)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_bit(dtype):
    values = [0.1234567, -3.7654321]
    expected = LatentStatistics(values, [1.0, 2.0], values, [1.0, 2.0])
    torch.set_default_dtype(dtype)
    try:
        again = LatentStatistics.from_json(expected.to_json())
        built = LatentStatistics(values, [1.0, 2.0], values, [1.0, 2.0])
        identity = LatentStatistics.identity(2, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    for statistics in (again, built):
        assert torch.equal(statistics.texture_mean, torch.tensor(values)) and statistics.digest() == expected.digest()
    assert identity.texture_std.dtype == torch.float32
