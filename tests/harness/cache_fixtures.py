"""A tree of 13 photographs in 3 classes, tiny encoders, and the cache that one uninterrupted run makes of them.

For modules that say pytest_plugins = ["harness.cache_fixtures"]; nobody writes to what these fixtures give.
"""

import pytest
import torch

from harness.image_trees import write_tree
from harness.tiny_caches import encode_config
from harness.tiny_encoders import save_autoencoder, save_dinov2
from sfd_fast.commands.encode import run_encode
from sfd_fast.config import SemVAEConfig
from sfd_fast.formats.model_folder import save_model
from sfd_fast.models.semvae import SemVAE


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Paths of a tree of 13 photographs in 3 classes, and of tiny encoders."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = SemVAEConfig(
        feature_channels=24, hidden_size=24, num_heads=2, encoder_depth=1, decoder_depth=1, latent_channels=3
    )
    save_model(root / "semvae", SemVAE(config))
    return {
        "images": str(write_tree(root / "tree")),
        "vfm": str(save_dinov2(root / "vfm")),
        "texture_codec": str(save_autoencoder(root / "codec")),
        "semvae": str(root / "semvae"),
    }


@pytest.fixture(scope="session")
def encoded_cache(parts, tmp_path_factory):
    """One uninterrupted encoding, and its folder."""
    out = tmp_path_factory.mktemp("cache") / "out"
    run_encode(encode_config(parts, out, features=True))
    return out
