"""`sfd encode`: images become shards of composite latents with their statistics, what SFD is trained on."""

from dataclasses import dataclass
from typing import Literal

from sfd_fast.config import require
from sfd_fast.config.checks import FilePath
from sfd_fast.data.encode.options import CacheOptions


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(CacheOptions):
    """Latents of a folder of images, to train SFD on.

    Defaults: the released settings, stored in bf16; --preset imagenet256: in fp32, as released.
    """

    out: FilePath = "runs/latents"
    texture_codec: FilePath = ""
    """KL autoencoder: LDM checkpoint, directory saved by diffusers or by us. pixels: none, the pixels themselves;
    pixels:2: squares of 2 x 2 of them folded into channels"""
    semvae: FilePath = ""
    """SemVAE: our directory, or a released checkpoint; vfm is then the encoder that it was trained with. Empty: texture
    alone, without semantic latents"""
    storage: Literal["bf16", "fp16", "fp32"] = "bf16"
    """fp32 is the released caches'"""
    posterior: Literal["sample", "moments"] = "sample"
    """texture: one sample by (seed, image), as released; moments: mean and logvar, sampled anew at every visit"""
    features: bool = False
    """store VFM features too (REPA targets `stored`: 16 times the rest of the cache)"""
    seed: int = 0


def run_encode(config: EncodeConfig) -> None:
    """Writes latent shards with statistics and manifest into config.out."""
    from sfd_fast.data.encode.encoders import LatentEncoder
    from sfd_fast.data.encode.job import STORAGE, make_cache
    from sfd_fast.formats.released_model import load_semvae
    from sfd_fast.formats.texture import load_codec
    from sfd_fast.models.vfm import load_vfm
    from sfd_fast.ranks import Ranks

    config.require_given("images", "texture_codec")
    ranks = Ranks.join()
    device = ranks.device(config.device)
    codec = load_codec(config.texture_codec).to(device)
    require(
        config.image_size % codec.downsampling == 0,
        f"image_size {config.image_size} must be a multiple of the codec's downsampling, {codec.downsampling}",
    )
    semvae = load_semvae(config.semvae).eval().to(device) if config.semvae else None
    vfm = None
    if semvae is not None or config.features:
        vfm = load_vfm(config.vfm, grid_size=config.image_size // codec.downsampling).to(device)
    encoder = LatentEncoder(
        vfm,
        semvae,
        codec,
        image_size=config.image_size,
        dtype=STORAGE[config.storage],
        flip=config.flip,
        posterior=config.posterior,
        features=config.features,
        seed=config.seed,
    )
    make_cache(config, encoder, ranks)
