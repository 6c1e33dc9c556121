"""Settings of released SemVAE checkpoints from their weights and YAML."""

import numpy as np
import pytest
import torch
import yaml
from sklearn.decomposition import PCA as ReferencePCA

from sfd_fast.config import SemVAEConfig
from sfd_fast.formats.released_model import convert_released, load_semvae
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


def pca_file(path, features, *, rank=None):
    """The authors' file: scikit-learn's PCA of standardised features."""
    mean, std = features.mean(0), features.std(0)
    pca = ReferencePCA(n_components=rank).fit((features - mean) / std)
    torch.save({"pca_model": pca, "mean": mean, "std": std}, path)
    return pca, mean, std


def test_the_authors_pca_becomes_a_semvae(tmp_path):
    features = np.random.default_rng(0).normal(size=(200, 24)) @ np.random.default_rng(1).normal(size=(24, 24)) + 3
    pca, mean, std = pca_file(tmp_path / "dino_pca_model.pth", features)
    tokens = torch.from_numpy(features[:9]).float()[None]
    expected = pca.transform((features[:9] - mean) / std)[:, :8]  # docs/METHOD.md 6: eight channels
    convert_released(tmp_path / "dino_pca_model.pth", tmp_path / "pca")
    for model in (load_semvae(tmp_path / "dino_pca_model.pth"), load_semvae(tmp_path / "pca")):
        assert (model.config.architecture, model.config.latent_channels) == ("pca", 8)
        latents = model.encode(tokens)[0]
        torch.testing.assert_close(latents[0], torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)
    whole = load_semvae(tmp_path / "dino_pca_model.pth", {"latent_channels": 24})
    torch.testing.assert_close(whole.decode(whole.encode(tokens)[0]), tokens, rtol=1e-4, atol=1e-3)


def test_a_pca_of_plain_tensors_is_read_too(tmp_path):
    components, mean = torch.linalg.qr(torch.randn(6, 6))[0][:3], torch.randn(6)
    torch.save({"components": components, "mean": mean}, tmp_path / "a.pth")
    model, tokens = load_semvae(tmp_path / "a.pth"), torch.randn(1, 4, 6)
    assert model.config.latent_channels == 3
    torch.testing.assert_close(model.encode(tokens)[0], (tokens - mean) @ components.t())


@pytest.mark.parametrize(
    "tree",
    [{"pca_model": 3}, {"pca_model": {}, "mean": torch.zeros(3)},
     {"components": torch.zeros(3), "mean": torch.zeros(3)},
     {"components": torch.zeros(2, 3), "mean": torch.zeros(4)}, {"components": "many", "mean": torch.zeros(4)}],
)  # fmt: skip
def test_malformed_pca_files_are_one_line(tmp_path, tree):
    torch.save(tree, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth") as error:
        load_semvae(tmp_path / "a.pth")
    assert "\n" not in str(error.value)
