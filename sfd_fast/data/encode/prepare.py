"""`sfd features` and `sfd encode`: a folder of images becomes shards, on one process or many, resumable, exact.

Images are numbered by the screened index. Shard k holds the images k * shard_size and on, whatever the number of ranks,
and is encoded in batches of one fixed size (the last one padded), so every run gives the same bytes. Run again over a
finished folder, it encodes only shards that are missing or damaged.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sfd_fast.config import Precision, require, require_positive
from sfd_fast.data.cache.manifest import begin
from sfd_fast.data.encode.encoders import FeatureEncoder, LatentEncoder
from sfd_fast.data.encode.job import Job
from sfd_fast.data.images.index import INDEX_FOLDER, open_index
from sfd_fast.ranks import Ranks

STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class FeaturesConfig:
    """VFM features of a folder of images, to train SemVAE on.

    The released SemVAE's own: --preset imagenet256 (shorter side 256, centre 224, fp16, no flips; docs/METHOD.md 2).
    """

    images: str = ""
    """class-per-folder tree, folder of *.tar shards (WebDataset), or Hugging Face dataset (folder, or hf://ORG/NAME)"""
    out: str = "runs/features"
    vfm: str = "dinov2-b"
    """directory saved by transformers, hub id, or dinov2-s/b/l/g, mae-b/l, clip-b/l, siglip-b"""
    image_size: int = 256
    crop: Literal["adm", "resize"] = "adm"
    """adm: the released crop, pixel for pixel; resize: shorter side to image_size * 256 / 224, then the centre"""
    grid_size: int = 16
    """tokens along each axis"""
    flip: bool = True
    """also store the mirrored images"""
    storage: Literal["bf16", "fp16", "fp32"] = "fp16"
    shard_size: int = 1024
    """images per shard: what a killed run may have to repeat"""
    batch_size: int = 32
    """images encoded at once; results differ between sizes in the last bits of fp32"""
    decoder: Literal["pil", "dali"] = "pil"
    """pil: exact; dali: decodes on `device` within a small difference (sfd_fast.data.images.dali); worth it on a GPU:
    on a CPU it is no faster than PIL (benchmarks/data.py)"""
    on_bad: Literal["skip", "fail"] = "skip"
    """unreadable images"""
    verify: bool = False
    """compare the checksums of shards that are there already: those that differ are encoded again"""
    num_threads: int = 0
    """decoding threads of a rank; 0: one per processor"""
    device: str = "auto"
    """auto: the rank's GPU, or else the CPU; cuda: the rank's GPU"""
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "grid_size", "shard_size", "batch_size")
        require(self.num_threads >= 0, f"num_threads {self.num_threads} must not be negative")


@dataclass(frozen=True)
class EncodeConfig:
    """Latents of a folder of images, to train SFD on.

    Defaults: the released settings, stored in bf16; --preset imagenet256: in fp32, as released.
    """

    images: str = ""
    """class-per-folder tree, folder of *.tar shards (WebDataset), or Hugging Face dataset (folder, or hf://ORG/NAME)"""
    out: str = "runs/latents"
    texture_codec: str = ""
    """KL autoencoder: LDM checkpoint, directory saved by diffusers or by us"""
    semvae: str = ""
    """SemVAE: our directory, or a released checkpoint"""
    vfm: str = "dinov2-b"
    """the encoder that SemVAE was trained with; as in `sfd features`"""
    image_size: int = 256
    crop: Literal["adm", "resize"] = "adm"
    flip: bool = True
    storage: Literal["bf16", "fp16", "fp32"] = "bf16"
    """fp32 is the released caches'"""
    posterior: Literal["sample", "moments"] = "sample"
    """texture: one sample by (seed, image), as released; moments: mean and logvar, sampled anew at every visit"""
    features: bool = False
    """store VFM features too (REPA targets `stored`: 16 times the rest of the cache)"""
    seed: int = 0
    shard_size: int = 1024
    batch_size: int = 32
    decoder: Literal["pil", "dali"] = "pil"
    """pil: exact; dali: within a small difference, worth it on a GPU (as in `sfd features`)"""
    on_bad: Literal["skip", "fail"] = "skip"
    """unreadable images"""
    verify: bool = False
    """compare the checksums of shards that are there already: those that differ are encoded again"""
    num_threads: int = 0
    """decoding threads of a rank; 0: one per processor"""
    device: str = "auto"
    """auto: the rank's GPU, or else the CPU; cuda: the rank's GPU"""
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "shard_size", "batch_size")
        require(self.num_threads >= 0, f"num_threads {self.num_threads} must not be negative")


def run_features(config: FeaturesConfig) -> None:
    """Writes shards of VFM features (feats_dino, labels) with their manifest into config.out."""
    from sfd_fast.models.vfm import load_vfm

    require(bool(config.images), "images is empty: give the folder of images")
    ranks = Ranks.join()
    device = ranks.device(config.device)
    vfm = load_vfm(config.vfm, grid_size=config.grid_size).to(device)
    run(config, FeatureEncoder(vfm, dtype=STORAGE[config.storage], flip=config.flip), "features", ranks, device)


def run_encode(config: EncodeConfig) -> None:
    """Writes latent shards with statistics and manifest into config.out."""
    from sfd_fast.formats.released_model import load_semvae
    from sfd_fast.formats.texture import load_codec
    from sfd_fast.models.vfm import load_vfm

    for name in ("images", "texture_codec", "semvae"):
        require(bool(getattr(config, name)), f"{name} is empty: `sfd encode` needs images, texture_codec and semvae")
    ranks = Ranks.join()
    device = ranks.device(config.device)
    codec = load_codec(config.texture_codec).to(device)
    require(
        config.image_size % codec.downsampling == 0,
        f"image_size {config.image_size} must be a multiple of the codec's downsampling, {codec.downsampling}",
    )
    encoder = LatentEncoder(
        load_vfm(config.vfm, grid_size=config.image_size // codec.downsampling).to(device),
        load_semvae(config.semvae).eval().to(device),
        codec,
        image_size=config.image_size,
        dtype=STORAGE[config.storage],
        flip=config.flip,
        posterior=config.posterior,
        features=config.features,
        seed=config.seed,
    )
    run(config, encoder, "latents", ranks, device)


def run(
    config: FeaturesConfig | EncodeConfig,
    encoder: FeatureEncoder | LatentEncoder,
    kind: Literal["features", "latents"],
    ranks: Ranks,
    device: torch.device,
    report: Callable[[str], None] = print,
) -> None:
    """Screens the images, then encodes the shards that are not there or damaged; all ranks together."""
    out = Path(config.out)
    num_threads = config.num_threads or os.cpu_count() or 1
    index = open_index(
        config.images, out / INDEX_FOLDER, on_bad=config.on_bad, num_threads=num_threads, ranks=ranks, report=report
    )
    settings = {
        "kind": kind,
        "images": index.fingerprint(),
        "num_images": len(index),
        "image_size": config.image_size,
        "crop": config.crop,
        "decoder": config.decoder,
        "flip": config.flip,
        "storage": config.storage,
        "precision": config.precision,
        "shard_size": config.shard_size,
    } | encoder.settings()
    sources = {name: located(getattr(config, name)) for name in encoder.parts() + ("images",)}
    ranks.on_first(lambda: begin(out, settings, sources))
    manifest = begin(out, settings)
    job = Job(out, index, encoder, manifest["fingerprint"], config, num_threads, device, kind)
    if manifest["complete"]:
        job.repair(manifest, ranks, report)
    else:
        job.complete(manifest, ranks, report)


def located(source: str) -> str:
    """The absolute path of what is on this disk; hub ids and short names as they are."""
    return str(Path(source).absolute()) if Path(source).exists() else source
