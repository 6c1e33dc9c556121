"""Saving and loading of models, and conversion between released files and our directories."""

import json
from collections import OrderedDict

import pytest
import torch
import yaml
from harness.support import GOLDEN, load_golden, load_golden_config
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from sfd_fast.config import ModelConfig, OptimizerConfig, SemVAEConfig, SFDConfig, TextureConfig, TransportConfig
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.formats.model_folder import read_config, read_description, read_statistics, save_model
from sfd_fast.formats.released_model import (
    Converted,
    convert_released,
    export_released,
    load_model,
    load_released,
    load_semvae,
)
from sfd_fast.formats.texture import load_codec, save_codec, to_ldm
from sfd_fast.models.dit import LightningDiT
from sfd_fast.models.semvae import SemVAE
from sfd_fast.models.texture import IdentityCodec, TextureCodec

OFFICIAL = GOLDEN / "sfd.official.pt"
TINY = ModelConfig(
    hidden_size=32, depth=2, num_heads=2, grid_size=4, texture_channels=3, semantic_channels=2, num_classes=10,
    repa_channels=8, repa_depth=1, repa_hidden=16,
)  # fmt: skip
RUN = SFDConfig(model=TINY, transport=TransportConfig(delta_t=0.5), optimizer=OptimizerConfig(extra_ema_decays=(0.9,)))
SMALL_SEMVAE = SemVAEConfig(feature_channels=24, hidden_size=48, latent_channels=4, encoder_depth=1, decoder_depth=1)
SMALL_CODEC = TextureConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4)
RELEASED_CONFIG = {"model": {"model_type": "LightningDiT-tiny", "semantic_chans": 2, "semfirst_delta_t": 0.5}}


def same_state(a, b):
    """Equality of two state dicts in keys, order, dtypes and every bit."""
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    model = LightningDiT(TINY)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def released_file(path, *, prefix="", with_config=True, **extra):
    """A released checkpoint of two tiny models: raw weights of seed 0, EMA of seed 1."""
    raw, averaged = tiny_model(0).state_dict(), tiny_model(1).state_dict()
    content = {"model": OrderedDict((prefix + key, value) for key, value in raw.items()), "ema": averaged, "opt": {
        "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.randn(4)}}, "param_groups": [{"betas": (0.9, 0.95)}]}}
    if with_config:
        content["config"] = OmegaConf.create(RELEASED_CONFIG)
    torch.save(content | extra, path)
    return content | extra


def test_a_network_comes_back_with_every_bit_and_its_run(tmp_path):
    model = tiny_model()
    statistics = LatentStatistics(torch.randn(3), torch.rand(3) + 0.1, torch.randn(2), torch.rand(2) + 0.1, 0.7)
    save_model(tmp_path, model, config=RUN, statistics=statistics, card={"step": 1200, "data": "digits"})
    again = load_model(tmp_path)
    assert again.config == TINY and not again.training
    assert same_state(again.state_dict(), model.state_dict())
    assert read_config(tmp_path) == RUN
    assert read_description(tmp_path)[1]["card"] == {"step": 1200, "data": "digits"}
    for name in ("texture_mean", "texture_std", "semantic_mean", "semantic_std"):
        assert torch.equal(getattr(read_statistics(tmp_path), name), getattr(statistics, name))
    assert read_statistics(tmp_path).multiplier == 0.7


def test_a_loaded_network_can_be_trained_on(tmp_path):
    save_model(tmp_path, tiny_model())
    model = load_model(tmp_path, residual="bf16", checkpoint_activations=1.0).train()
    assert (model.residual, model.checkpoint_activations) == ("bf16", 1.0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in tiny_model().named_parameters() if parameter.requires_grad}
    model(torch.randn(1, 5, 4, 4), torch.rand(1), torch.rand(1), torch.tensor([1])).sum().backward()


def test_given_weights_are_stored_instead_of_the_models_own(tmp_path):
    average = tiny_model(1).state_dict()
    save_model(tmp_path, tiny_model(0), weights=average)
    assert same_state(load_model(tmp_path).state_dict(), average)


def test_a_network_saved_alone_has_no_run_and_no_statistics(tmp_path):
    save_model(tmp_path, tiny_model())
    assert read_statistics(tmp_path) is None
    with pytest.raises(ValueError, match="saved with its network's config only"):
        read_config(tmp_path)


def test_a_run_of_another_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.model is not the config of the model"):
        save_model(tmp_path, tiny_model(), config=SFDConfig())


@pytest.mark.parametrize("architecture", ["transformer", "linear", "mlp", "resnet", "pca"])
def test_a_semvae_comes_back_with_every_bit(tmp_path, architecture):
    model = SemVAE(SemVAEConfig(**{**vars(SMALL_SEMVAE), "architecture": architecture}))
    save_model(tmp_path, model)
    again = load_semvae(tmp_path)
    assert again.config == model.config
    assert same_state(again.state_dict(), model.state_dict())


def test_codecs_come_back(tmp_path):
    codec = TextureCodec(SMALL_CODEC).eval()
    save_codec(tmp_path / "texture", codec)
    again = load_codec(tmp_path / "texture")
    assert again.config == SMALL_CODEC
    assert same_state(again.autoencoder.state_dict(), codec.autoencoder.state_dict())
    save_codec(tmp_path / "pixels", IdentityCodec(4, 2))
    pixels = load_codec(tmp_path / "pixels")
    assert (pixels.latent_channels, pixels.downsampling) == (4, 2)
    save_model(tmp_path / "dit", tiny_model())
    with pytest.raises(ValueError, match="kind 'dit', not a texture codec"):
        load_codec(tmp_path / "dit")


@pytest.mark.golden
def test_a_released_checkpoint_is_a_ready_network():
    tensors = load_golden("sfd.golden")
    for source, config in ((OFFICIAL, None), (GOLDEN / "sfd.weights.safetensors", load_golden_config("sfd"))):
        model = load_released(source, config)
        with torch.no_grad():
            velocity = model(tensors["x"], tensors["t_tex"], tensors["t_sem"], tensors["y"])
        torch.testing.assert_close(velocity, tensors["forward"], rtol=1e-4, atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["sfd", "sync", "noshift", "patch2"])
def test_golden_weights_and_guides_load(name):
    config = load_golden_config(name)
    assert load_released(GOLDEN / f"{name}.weights.safetensors", config).config.depth == 4
    guide = load_released(GOLDEN / f"{name}.guide.weights.safetensors", {**config, "depth": 2, "repa_depth": 1})
    assert guide.config.depth == 2


@pytest.mark.golden
def test_the_released_checkpoint_survives_conversion_and_back(tmp_path):
    convert_released(OFFICIAL, tmp_path / "model")
    export_released(tmp_path / "model", tmp_path / "again.pt")
    again, expected = (torch.load(path, weights_only=False) for path in (tmp_path / "again.pt", OFFICIAL))
    assert list(again) == list(expected)
    assert same_state(again["model"], expected["model"]) and same_state(again["ema"], expected["ema"])
    assert again["opt"] == expected["opt"]
    assert isinstance(again["config"], DictConfig) and again["config"] == expected["config"]
    assert same_state(load_model(tmp_path / "model").state_dict(), expected["ema"])


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_ema_or_raw_weights_with_or_without_prefix_survive_conversion_and_back(tmp_path, prefix, weights):
    expected = released_file(tmp_path / "a.pt", prefix=prefix)
    chosen = tiny_model(1 if weights == "ema" else 0).state_dict()
    assert same_state(load_released(tmp_path / "a.pt", weights=weights).state_dict(), chosen)
    assert convert_released(tmp_path / "a.pt", tmp_path / "d", weights=weights).kind == "dit"
    assert same_state(load_model(tmp_path / "d").state_dict(), chosen)
    assert read_config(tmp_path / "d").transport.delta_t == 0.5
    export_released(tmp_path / "d", tmp_path / "b.pt")
    again = torch.load(tmp_path / "b.pt", weights_only=False)
    assert list(again) == list(expected)
    assert same_state(again["model"], expected["model"]) and same_state(again["ema"], expected["ema"])
    assert torch.equal(again["opt"]["state"][0]["exp_avg"], expected["opt"]["state"][0]["exp_avg"])
    assert again["opt"]["param_groups"] == expected["opt"]["param_groups"]
    assert again["config"] == expected["config"]


def test_plain_settings_and_settings_given_beside_the_file_do_as_well(tmp_path):
    average = tiny_model(1).state_dict()
    released_file(tmp_path / "plain.pt", with_config=False, config=RELEASED_CONFIG)
    released_file(tmp_path / "none.pt", with_config=False)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RELEASED_CONFIG))
    for source, config in (("plain.pt", None), ("none.pt", RELEASED_CONFIG), ("none.pt", tmp_path / "run.yaml")):
        assert same_state(load_released(tmp_path / source, config).state_dict(), average)


@pytest.mark.parametrize("weights, seed", [("ema", 1), ("model", 0)])
def test_training_state_can_be_left_out(tmp_path, weights, seed):
    released_file(tmp_path / "a.pt")
    convert_released(tmp_path / "a.pt", tmp_path / "d", weights=weights, keep_training_state=False)
    export_released(tmp_path / "d", tmp_path / "b.pt")
    again = torch.load(tmp_path / "b.pt", weights_only=False)
    assert list(again) == [weights, "config"]
    assert same_state(again[weights], tiny_model(seed).state_dict())


def test_saving_over_a_converted_model_forgets_the_file_it_came_from(tmp_path):
    released_file(tmp_path / "a.pt")
    convert_released(tmp_path / "a.pt", tmp_path / "d")
    save_model(tmp_path / "d", tiny_model(2), config=RUN)
    export_released(tmp_path / "d", tmp_path / "b.pt")
    assert same_state(torch.load(tmp_path / "b.pt", weights_only=False)["ema"], tiny_model(2).state_dict())


def test_a_model_of_our_own_becomes_a_released_checkpoint(tmp_path):
    save_model(tmp_path / "d", tiny_model(), config=RUN)
    export_released(tmp_path / "d", tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=False)
    assert list(content) == ["model", "ema", "opt", "config"]
    assert content["config"].model.semfirst_delta_t == 0.5
    assert same_state(load_released(tmp_path / "a.pt").state_dict(), tiny_model().state_dict())


@pytest.mark.golden
def test_a_released_semvae_checkpoint_converts_and_comes_back(tmp_path):
    weights = OrderedDict(load_golden("semvae.weights"))
    text = yaml.safe_dump({"model": {"arch": "transformer", "params": {"transformer_heads": 6}},
                           "training": {"loss": {"kl_weight": 1e-7}}})  # fmt: skip
    expected = {
        "iteration": 1_000_000, "model_state_dict": weights, "optimizer_state_dict": {"state": {}, "param_groups": []},
        "scheduler_state_dict": {"_milestones": [500]}, "loss": 0.25, "loss_averages": {"mse": 0.1}, "config": text,
        "input_dim": 24, "bottleneck_dim": 4,
    }  # fmt: skip
    torch.save(expected, tmp_path / "semvae.pt")
    tensors = load_golden("semvae.golden")
    for model in (load_semvae(tmp_path / "semvae.pt"),
                  load_semvae(GOLDEN / "semvae.weights.safetensors", {"num_heads": 6})):  # fmt: skip
        torch.testing.assert_close(model.encode(tensors["features"])[0], tensors["mean"], rtol=1e-4, atol=1e-5)
    assert convert_released(tmp_path / "semvae.pt", tmp_path / "d") == Converted("semvae", [])
    assert load_semvae(tmp_path / "d").config.num_heads == 6
    export_released(tmp_path / "d", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    assert list(again) == list(expected)
    assert same_state(again.pop("model_state_dict"), expected.pop("model_state_dict"))
    assert again == expected


def test_a_semvae_of_our_own_becomes_a_released_checkpoint(tmp_path):
    model = SemVAE(SMALL_SEMVAE)
    save_model(tmp_path / "d", model, card={"step": 500})
    export_released(tmp_path / "d", tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (content["iteration"], content["input_dim"], content["bottleneck_dim"]) == (500, 24, 4)
    assert yaml.safe_load(content["config"])["model"]["params"]["transformer_heads"] == 6
    again = load_semvae(tmp_path / "a.pt")
    assert again.config == model.config
    assert same_state(again.state_dict(), model.state_dict())


def test_an_ldm_checkpoint_converts_and_comes_back(tmp_path):
    weights = OrderedDict(to_ldm(TextureCodec(SMALL_CODEC).autoencoder.state_dict(), SMALL_CODEC))
    weights["loss.discriminator.weight"] = torch.randn(3)
    expected = {"epoch": 50, "state_dict": weights}
    torch.save(expected, tmp_path / "ldm.ckpt")
    assert convert_released(tmp_path / "ldm.ckpt", tmp_path / "d").kind == "texture"
    assert load_codec(tmp_path / "d").config == SMALL_CODEC
    export_released(tmp_path / "d", tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert again["epoch"] == 50 and same_state(again["state_dict"], weights)


def test_pixel_space_has_no_released_format(tmp_path):
    save_codec(tmp_path / "d", IdentityCodec(3))
    with pytest.raises(ValueError, match="'identity' codec, which has no released format"):
        export_released(tmp_path / "d", tmp_path / "a.pt")


def test_a_checkpoint_of_another_size_is_refused_by_name(tmp_path):
    released_file(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="the configuration says hidden_size = 1152, the weights have 32"):
        load_released(tmp_path / "a.pt", {"hidden_size": 1152, "semantic_chans": 2})
    weights = tiny_model().state_dict() | {"blocks.1.mlp.w3.weight": torch.zeros(32, 84)}
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"'blocks.1.mlp.w3.weight' is \(32, 84\), the model has \(32, 85\)"):
        load_released(tmp_path / "a.safetensors", {"semantic_chans": 2})


def test_missing_and_unexpected_weights_are_named_and_counted(tmp_path):
    weights = tiny_model().state_dict()
    for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"):
        del weights[f"blocks.1.attn.{name}"]
    save_file(weights | {"extra": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"do not fit the model .*'blocks.1.attn.qkv.weight' is missing;.* and 2 more"):
        load_released(tmp_path / "a.safetensors", {"semantic_chans": 2})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_diverged_weights_are_refused_by_name(tmp_path, value):
    weights = tiny_model().state_dict()
    weights["blocks.0.norm2.weight"][3] = value
    save_file(weights, tmp_path / "a.safetensors")
    released_file(tmp_path / "a.pt", ema=weights)
    for source in ("a.safetensors", "a.pt"):
        with pytest.raises(ValueError, match="NaN or infinity .first in 'blocks.0.norm2.weight'.: that run diverged"):
            load_released(tmp_path / source, {"semantic_chans": 2})


def test_a_truncated_checkpoint_is_named(tmp_path):
    released_file(tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="a.pt is truncated or damaged"):
        convert_released(tmp_path / "a.pt", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_malicious_checkpoint_is_refused_and_nothing_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'flag')!r}, 'w')",)

    released_file(tmp_path / "a.pt", config=Evil())
    for attempt in (load_released, load_semvae, load_codec, load_model):
        with pytest.raises(ValueError, match="asks to load 'eval', which could run foreign code"):
            attempt(tmp_path / "a.pt")
    assert not (tmp_path / "flag").exists()


def test_a_model_directory_of_another_kind_is_refused(tmp_path):
    save_model(tmp_path, SemVAE(SMALL_SEMVAE))
    with pytest.raises(ValueError, match="kind 'semvae', not 'dit'"):
        load_model(tmp_path)


def test_settings_that_are_no_settings_are_refused(tmp_path):
    released_file(tmp_path / "a.pt", config=[1, 2])
    with pytest.raises(ValueError, match="the settings of .*a.pt are a list, not keys with values"):
        load_released(tmp_path / "a.pt")


def test_the_readable_config_says_what_is_inside(tmp_path):
    save_model(tmp_path, tiny_model(), config=RUN)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["kind"] == "dit" and content["config"]["transport"]["delta_t"] == 0.5
