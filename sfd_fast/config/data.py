"""What training reads: shards of latents, or of features."""

from dataclasses import dataclass
from typing import Literal

from sfd_fast.config.checks import require, require_positive


@dataclass(frozen=True)
class DataConfig:
    """Latent shards to train on."""

    path: str = ""
    """folder of *.safetensors shards with their statistics; also s3://, gs://, hf:// and other fsspec addresses"""
    cache_folder: str = ""
    """local folder for a copy of what lies on remote storage"""
    validation_path: str = ""
    """held-out shards; empty: `validation_samples` of `path` are held out"""
    validation_samples: int = 0
    """held-out samples, spread over the whole cache, so that every class has its share"""
    latent_multiplier: float = 1.0
    flip: bool = True
    """flipped and plain latents with probability 1/2"""
    num_workers: int = 2
    """threads that gather and normalise ahead of the step; the order does not depend on it"""
    texture_codec: str = ""
    """texture autoencoder for sample grids during training; empty: texture channels are shown as pixels"""
    targets: Literal["stored", "semvae", "online"] = "stored"
    """VFM features for REPA: stored in the cache, decoded from its semantic latents, or computed from the images"""
    semvae: str = ""
    """targets semvae: the SemVAE that the cache was encoded with"""
    vfm: str = ""
    """targets online: the VFM that the cache was encoded with, a directory or hub id"""
    images: str = ""
    """targets online: where the images of `path` are now, if they moved since they were encoded"""

    def __post_init__(self) -> None:
        require_positive(self, "latent_multiplier")
        require(self.num_workers >= 0, f"num_workers {self.num_workers} must not be negative")
        require(self.validation_samples >= 0, "validation_samples must not be negative")
        require(
            self.targets in ("stored", "semvae", "online"),
            f"data.targets '{self.targets}' is unknown; choose stored, semvae or online",
        )
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
class FeatureDataConfig:
    """Shards of VFM features to train SemVAE on."""

    path: str = ""
    """folder (or fsspec address) of *.safetensors shards with feats_dino (N, F, h, w), of `sfd features` or latents"""
    cache_folder: str = ""
    """local folder for a copy of what lies on remote storage"""
    validation_samples: int = 0
    """held-out samples, spread over the whole set"""
    flip: bool = True
    """flipped and plain features with probability 1/2; needs shards with both, as `sfd features` writes them"""

    def __post_init__(self) -> None:
        require(self.validation_samples >= 0, "validation_samples must not be negative")
