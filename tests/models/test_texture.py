"""Texture codecs: equality with the released autoencoder, the two-way key map, pixel space, bad input."""

import pytest
import torch
from harness.support import GOLDEN, load_golden

from sfd_fast.config import TextureConfig
from sfd_fast.formats.texture import (
    config_of_ldm,
    from_ldm,
    load_codec,
    parameter_names,
    texture_codec_from_ldm,
    to_ldm,
)
from sfd_fast.models.texture import IdentityCodec, TextureCodec, to_uint8


def ldm_state_dict(codec):
    return to_ldm(codec.autoencoder.state_dict(), codec.config)


SMALL = TextureConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4)


@pytest.fixture(scope="module")
def golden_codec():
    return texture_codec_from_ldm(load_golden("sdvae.weights")), load_golden("sdvae.golden")


@pytest.mark.golden
def test_encoding_and_decoding_equal_the_released_autoencoder(golden_codec):
    codec, tensors = golden_codec
    with torch.no_grad():
        mean, logvar = codec.encode(tensors["image"])
        image = codec.decode(tensors["mean"])
    torch.testing.assert_close(mean, tensors["mean"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logvar, tensors["logvar"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image, tensors["recon"], rtol=0, atol=1e-4)


@pytest.mark.golden
def test_ldm_names_survive_the_way_to_diffusers_and_back(golden_codec):
    released = load_golden("sdvae.weights")
    again = ldm_state_dict(golden_codec[0])
    assert again.keys() == released.keys()
    assert all(again[key].shape == released[key].shape and torch.equal(again[key], released[key]) for key in released)


@pytest.mark.golden
def test_golden_autoencoder_has_the_documented_size(golden_codec):
    assert sum(p.numel() for p in golden_codec[0].parameters()) == 3_373_507


@pytest.mark.golden
def test_architecture_is_read_from_the_weights():
    assert config_of_ldm(load_golden("sdvae.weights")) == TextureConfig(
        channels=32, channel_multipliers=(1, 1, 2, 2, 4), num_res_blocks=1, latent_channels=32
    )


@pytest.mark.parametrize("config", [TextureConfig(), SMALL], ids=["released", "small"])
def test_the_key_map_covers_every_parameter_of_diffusers_once(config):
    with torch.device("meta"):
        state = TextureCodec(config).autoencoder.state_dict()
    renamed = to_ldm(state, config)
    assert len(renamed) == len(state)
    back = from_ldm(renamed)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    assert config_of_ldm(renamed) == config
    assert len(set(parameter_names(config).values())) == len(parameter_names(config))


def test_released_architecture_halves_the_image_four_times():
    assert TextureConfig().downsampling == 16


def test_weights_of_a_training_loss_are_dropped():
    torch.manual_seed(0)
    codec = TextureCodec(SMALL).eval()
    weights = ldm_state_dict(codec) | {"loss.discriminator.weight": torch.zeros(1), "loss.logvar": torch.ones(1)}
    image = torch.rand(1, 3, 8, 8)
    again = texture_codec_from_ldm(weights)
    assert torch.equal(again.encode(image)[0], codec.encode(image)[0])


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}], ids=["bare", "state_dict"])
@pytest.mark.parametrize("name", ["codec.ckpt", "codec.pt"])
def test_a_codec_loads_from_a_checkpoint_file(tmp_path, wrap, name):
    codec = TextureCodec(SMALL).eval()
    torch.save(wrap(ldm_state_dict(codec)), tmp_path / name)
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(load_codec(tmp_path / name).decode(latents), codec.decode(latents))


@pytest.mark.golden
def test_a_codec_loads_from_safetensors():
    assert load_codec(GOLDEN / "sdvae.weights.safetensors").latent_channels == 32


def test_incomplete_weights_are_refused_by_name():
    weights = ldm_state_dict(TextureCodec(SMALL))
    del weights["decoder.mid.attn_1.q.weight"]
    with pytest.raises(ValueError, match="'decoder.mid_block.attentions.0.to_q.weight' is missing"):
        texture_codec_from_ldm(weights)


def test_foreign_weights_are_refused_by_name():
    with pytest.raises(ValueError, match="'encoder.conv_in.weight' is missing"):
        texture_codec_from_ldm({"x_embedder.proj.weight": torch.zeros(2, 2)})
    weights = ldm_state_dict(TextureCodec(SMALL))
    with pytest.raises(ValueError, match="'encoder.extra.weight' belongs to no KL autoencoder"):
        texture_codec_from_ldm(weights | {"encoder.extra.weight": torch.zeros(1)})


def test_images_and_latents_of_another_shape_are_refused():
    codec = TextureCodec(SMALL)
    with pytest.raises(ValueError, match=r"images of shape \(1, 3, 8, 9\).*multiples of 2"):
        codec.encode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match=r"latents of shape \(1, 5, 4, 4\) were given; this .* \(B, 4, H, W\)"):
        codec.decode(torch.zeros(1, 5, 4, 4))


def test_pixel_space_gives_colour_images_back_exactly():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    for downsampling in (1, 2):
        codec = IdentityCodec(3 * downsampling**2, downsampling)
        mean, logvar = codec.encode(images)
        assert mean.shape == (2, 3 * downsampling**2, 8 // downsampling, 8 // downsampling)
        assert torch.equal(codec.decode(mean), images)
        assert (logvar == -30).all()


def test_pixel_space_of_one_channel_is_grey():
    images = torch.rand(2, 1, 8, 8).expand(-1, 3, -1, -1)
    codec = IdentityCodec(4, downsampling=2)
    torch.testing.assert_close(codec.decode(codec.encode(images)[0]), images)


def test_pixel_space_latents_do_not_alias_the_images():
    images = torch.rand(1, 3, 4, 4)
    mean, _ = IdentityCodec(3).encode(images)
    mean.zero_()
    assert images.any()


def test_pixel_space_refuses_other_channel_counts():
    with pytest.raises(ValueError, match=r"latent_channels 5 .* must be 4 \(grey\) or 12 \(colour\)"):
        IdentityCodec(5, downsampling=2)
    with pytest.raises(ValueError, match=r"latents of shape \(1, 3, 2, 2\)"):
        IdentityCodec(1).decode(torch.zeros(1, 3, 2, 2))


def test_pixels_are_rounded_as_the_released_decoder_does():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.499, 1.0, 2.0])
    pixels = to_uint8(values.view(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert pixels.shape == (1, 1, 7, 3) and pixels.dtype == torch.uint8
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]  # 127.5 x + 128, clamped, truncated
