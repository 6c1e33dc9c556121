"""Settings of released SemVAE checkpoints from their weights and YAML."""

import pytest
import torch
import yaml

from sfd_fast.config import SemVAEConfig
from sfd_fast.formats.released_semvae import semvae_config, semvae_to_released
from sfd_fast.models.semvae import SemVAE

SMALL = {"feature_channels": 24, "hidden_size": 48, "latent_channels": 4}


def weights_of(config):
    with torch.device("meta"):
        return SemVAE(config).state_dict()


@pytest.mark.parametrize(
    "config",
    [
        SemVAEConfig("transformer", num_heads=6, encoder_depth=2, decoder_depth=3, **SMALL),
        SemVAEConfig("mlp", num_heads=1, num_layers=3, **SMALL),
        SemVAEConfig("resnet", num_heads=1, encoder_depth=2, decoder_depth=2, num_layers=3, **SMALL),
        SemVAEConfig("resnet", num_heads=1, encoder_depth=1, decoder_depth=1, num_layers=1, **SMALL),
        SemVAEConfig(),
    ],
    ids=["transformer", "mlp", "resnet", "resnet without mlp", "released"],
)
def test_weights_and_yaml_give_the_network_back(config):
    found = semvae_config(weights_of(config), yaml.safe_load(yaml.safe_dump(semvae_to_released(config))))
    assert {k: v.shape for k, v in weights_of(found).items()} == {k: v.shape for k, v in weights_of(config).items()}
    assert (found.architecture, found.num_heads, found.kl_weight) == (
        config.architecture, config.num_heads, config.kl_weight
    )  # fmt: skip


def test_a_linear_autoencoder_is_recognised():
    config = SemVAEConfig("linear", num_heads=1, **SMALL)
    found = semvae_config(weights_of(config), {})
    assert found.architecture == "linear"
    assert (found.feature_channels, found.latent_channels) == (24, 4)


@pytest.mark.parametrize(
    "settings", [{"num_heads": 6}, {"model": {"params": {"transformer_heads": 6}}}, {"model": {"num_heads": 6}}]
)
def test_heads_are_found_wherever_the_settings_name_them(settings):
    assert semvae_config(weights_of(SemVAEConfig(**SMALL)), settings).num_heads == 6


def test_unknown_heads_are_refused_with_the_way_to_say_them():
    with pytest.raises(ValueError, match=r"number of attention heads is unknown .*\{'num_heads': 6\}"):
        semvae_config(weights_of(SemVAEConfig(**SMALL)), {})


def test_foreign_weights_are_refused():
    with pytest.raises(ValueError, match="not the weights of a SemVAE"):
        semvae_config({"blocks.0.norm1.weight": torch.zeros(1)}, {})


def test_autoencoders_without_a_variance_are_refused():
    weights = weights_of(SemVAEConfig("linear", num_heads=1, **SMALL))
    weights["encoder.0.weight"] = torch.zeros(4, 24)
    with pytest.raises(ValueError, match="only variational SemVAEs"):
        semvae_config(weights, {})
