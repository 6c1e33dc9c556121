"""An AutoencoderKL that diffusers saved serves wherever a texture codec is asked for."""

from dataclasses import replace

import pytest
import torch
from harness.tiny_encoders import save_autoencoder
from harness.tiny_pipelines import STATISTICS, TINY, drawn, random_model
from harness.tiny_run import MODEL, tiny_config, with_data, write_data
from safetensors.torch import load_file, save_file

from sfd_fast.formats.texture import load_codec, save_codec
from sfd_fast.models.texture import IdentityCodec
from sfd_fast.sampling.pipeline import SFDPipeline
from sfd_fast.training.diffusion import run_train

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("codec") / "vae")


def own_images(folder, latents):
    """What diffusers itself decodes."""
    from diffusers import AutoencoderKL

    with torch.no_grad():
        return AutoencoderKL.from_pretrained(folder).eval().decode(latents).sample


def test_a_saved_codec_is_a_directory_of_diffusers_again(folder, tmp_path):
    save_codec(tmp_path / "again", load_codec(folder))
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["config.json", WEIGHTS, "sfd_fast.json"]
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(own_images(tmp_path / "again", latents), own_images(folder, latents))


@pytest.mark.parametrize("first", ["ours", "diffusers"])
def test_the_codec_saved_last_is_the_one_that_is_loaded(folder, tmp_path, first):
    codecs = {"ours": IdentityCodec(4, 2), "diffusers": load_codec(folder)}
    last = "diffusers" if first == "ours" else "ours"
    for name in (first, last):
        save_codec(tmp_path / "codec", codecs[name])
    assert type(load_codec(tmp_path / "codec")) is type(codecs[last])


def test_a_pipeline_with_it_is_saved_and_decodes_like_diffusers(folder, tmp_path):
    pipe = SFDPipeline(
        random_model(TINY, 0), statistics=STATISTICS, texture_codec=load_codec(folder), delta_t=0.3, device="cpu"
    )
    pipe.save_pretrained(tmp_path / "pipeline")
    again = SFDPipeline.from_pretrained(tmp_path / "pipeline", device="cpu")
    decode, seen = again.texture_codec.decode, []
    again.texture_codec.decode = lambda latents: seen.append(latents) or decode(latents)
    images = drawn(again, [1, 2], num_inference_steps=3)
    expected = (127.5 * own_images(folder, seen[0])[:2] + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert images.shape == (2, 16, 16, 3) and images.std() > 1
    assert (torch.from_numpy(images) == expected).all()


def test_it_draws_the_sample_grids_of_training(tmp_path):
    codec = save_autoencoder(tmp_path / "vae", latent_channels=MODEL.texture_channels)
    config = tiny_config(write_data(tmp_path / "data"), tmp_path / "run", sample_every=8, num_sample_images=4)
    run_train(with_data(config, texture_codec=str(codec)), device="cpu", progress=False)
    from PIL import Image

    # 2 x 2 images of 4 x 4 latents, each of them 4 x 4 pixels
    assert Image.open(tmp_path / "run" / "samples" / "00000008.png").size == (32, 32)


def test_a_network_with_it_samples(tmp_path):
    """A run names its codec, and `sfd sample` finds it there."""
    codec = save_autoencoder(tmp_path / "vae", latent_channels=MODEL.texture_channels)
    config = with_data(tiny_config(write_data(tmp_path / "data"), tmp_path / "run"), texture_codec=str(codec))
    model = run_train(replace(config, train=replace(config.train, max_steps=1)), device="cpu", progress=False).model
    assert SFDPipeline.from_pretrained(model, device="cpu")([0], num_inference_steps=3, output_type="np").images.any()


def damaged(folder, target, change):
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    if change == "truncated":
        (target / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    elif change != "absent":
        tensors = load_file(folder / WEIGHTS)
        if change == "missing":
            del tensors["decoder.conv_out.weight"]
        elif change == "reshaped":
            tensors["decoder.conv_out.weight"] = torch.zeros(3, 16, 3, 3)
        else:
            tensors["decoder.conv_out.weight"][0, 0, 0, 0] = float("nan")
        save_file(tensors, target / WEIGHTS, {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncated", "bad: its AutoencoderKL cannot be loaded: "),
        ("absent", "bad: its AutoencoderKL cannot be loaded: "),
        ("missing", "bad lacks 1 weights of its AutoencoderKL, the first is 'decoder.conv_out.weight'"),
        ("reshaped", "bad has in another shape 1 weights of its AutoencoderKL, the first is 'decoder.conv_out.weight'"),
        ("nan", "the weights of .*bad hold NaN or infinity"),
    ],
)
def test_damaged_directories_are_clear_errors(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_codec(damaged(folder, tmp_path / "bad", change))


def test_an_autoencoder_in_a_pipelines_folder_of_diffusers_is_found(folder, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    save_codec(tmp_path / "vae", load_codec(folder))
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_codec(tmp_path).decode(latents), own_images(folder, latents))


@pytest.mark.parametrize("kind", ["AutoencoderDC", "VQModel"])
@pytest.mark.parametrize("place", ["", "vae"])
def test_other_codecs_of_diffusers_are_refused_by_their_class(tmp_path, kind, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "config.json").write_text(f'{{"_class_name": "{kind}"}}')
    with pytest.raises(ValueError, match=f"holds a {kind} of diffusers; the texture codec must be an AutoencoderKL"):
        load_codec(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ("[1, 2]", "config.json must hold one JSON object, but holds list"),
        ("{", "config.json cannot be read as JSON"),
        ("[" * 100_000, "config.json cannot be read as JSON: nested too deeply"),
        ('{"_class_name": "AutoencoderKL", "layers_per_block": 1000000000}', "layers_per_block = 10+; at most 1000"),
        ('{"_class_name": "AutoencoderKL", "block_out_channels": [1099511627776]}', "block_out_channels = 10995116277"),
        ('{"_class_name": "AutoencoderKL", "latent_channels": "many"}', "its AutoencoderKL cannot be loaded"),
    ],
)
def test_malformed_configs_of_diffusers_are_one_line_at_once(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message) as error:
        load_codec(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
