"""What training reads: shards of latents, or of features."""

from dataclasses import dataclass
from typing import Annotated, Literal

from sfd_fast.config.checks import MAY_CHANGE, FilePath, Natural, Positive, Settings, require

Place = Annotated[FilePath, MAY_CHANGE]
"""where data lies: it may have moved when a run goes on"""


@dataclass(frozen=True)
class DataConfig(Settings, section="data"):
    """Latent shards to train on."""

    path: Place = ""
    """folder of *.safetensors shards with their statistics; also s3://, gs://, hf:// and other fsspec addresses"""
    cache_folder: Place = ""
    """local folder for a copy of what lies on remote storage"""
    validation_path: Place = ""
    """held-out shards; empty: `validation_samples` of `path` are held out"""
    validation_samples: Natural = 0
    """held-out samples, spread over the whole cache, so that every class has its share"""
    latent_multiplier: Positive = 1.0
    normalise_texture: bool = True
    """standardise every texture channel by the statistics of the cache; false: latents as they are stored"""
    normalise_semantic: bool = True
    """the same of the semantic channels"""
    flip: bool = True
    """flipped and plain latents with probability 1/2, where the cache has both"""
    num_workers: Annotated[Natural, MAY_CHANGE] = 2
    """threads that gather and normalise ahead of the step; the order does not depend on it"""
    texture_codec: Place = ""
    """texture autoencoder for sample grids during training; empty: texture channels are shown as pixels"""
    targets: Literal["stored", "semvae", "online"] = "stored"
    """VFM features for REPA: stored in the cache, decoded from its semantic latents, or computed from the images"""
    semvae: Place = ""
    """targets semvae: the SemVAE that the cache was encoded with"""
    vfm: Place = ""
    """targets online: the VFM that the cache was encoded with, a directory or hub id"""
    images: Place = ""
    """targets online: where the images of `path` are now, if they moved since they were encoded"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("semvae", "semvae"), ("vfm", "online"), ("images", "online")):
            require(
                not getattr(self, name) or self.targets == kind,
                f"data.{name} is given, but data.targets is '{self.targets}', which does not use it: set data.targets "
                f"to '{kind}', or leave data.{name} out",
            )
        for name, kind in (("semvae", "semvae"), ("vfm", "online")):
            require(
                bool(getattr(self, name)) or self.targets != kind,
                f"data.targets '{kind}' needs data.{name}: the one that the cache was encoded with",
            )


@dataclass(frozen=True)
class FeatureDataConfig(Settings, section="data"):
    """Shards of VFM features to train SemVAE on."""

    path: Place = ""
    """folder (or fsspec address) of *.safetensors shards with feats_dino (N, F, h, w), of `sfd features` or latents"""
    cache_folder: Place = ""
    """local folder for a copy of what lies on remote storage"""
    validation_samples: Natural = 0
    """held-out samples, spread over the whole set"""
    flip: bool = True
    """flipped and plain features with probability 1/2, where the shards have both (`sfd features --flip true`)"""
