"""`sfd features`: images become shards of VFM features, what SemVAE is trained on."""

from dataclasses import dataclass
from typing import Literal

from sfd_fast.config.checks import Count, FilePath
from sfd_fast.data.encode.options import CacheOptions


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(CacheOptions):
    """VFM features of a folder of images, to train SemVAE on.

    The released SemVAE's own: --preset imagenet256 (shorter side 256, centre 224, fp16, no flips; docs/METHOD.md 2).
    """

    out: FilePath = "runs/features"
    storage: Literal["bf16", "fp16", "fp32"] = "fp16"
    grid_size: Count = 16
    """tokens along each axis"""


def run_features(config: FeaturesConfig) -> None:
    """Writes shards of VFM features (feats_dino, labels) with their manifest into config.out."""
    from sfd_fast.data.encode.encoders import FeatureEncoder
    from sfd_fast.data.encode.job import STORAGE, make_cache
    from sfd_fast.models.vfm import load_vfm
    from sfd_fast.ranks import Ranks

    config.require_given("images")
    ranks = Ranks.join()
    vfm = load_vfm(config.vfm, grid_size=config.grid_size).to(ranks.device(config.device))
    make_cache(config, FeatureEncoder(vfm, dtype=STORAGE[config.storage], flip=config.flip), ranks)
