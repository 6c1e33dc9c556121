"""`sfd features` and `sfd encode`: a folder of images becomes shards, on one process or many, resumable, exact.

Images are numbered by the screened index. Shard k holds the images k * shard_size and on, whatever the number of ranks,
and is encoded in batches of one fixed size (the last one padded), so every run gives the same bytes.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sfd_fast.config import Precision, require, require_positive
from sfd_fast.data.encoders import FeatureEncoder, LatentEncoder
from sfd_fast.data.image_loader import decoded_batches
from sfd_fast.data.index import ImageIndex, open_index
from sfd_fast.data.manifest import MANIFEST, begin
from sfd_fast.data.progress import Progress
from sfd_fast.data.ranks import Ranks
from sfd_fast.data.shards import ShardWriter, checksum, map_tensors, read_header, write_json
from sfd_fast.data.statistics import ChannelMoments, LatentStatistics, merge_all

STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INDEX_FOLDER = "index"


@dataclass(frozen=True)
class FeaturesConfig:
    """VFM features of a folder of images, to train SemVAE on.

    The released SemVAE's own features: crop resize, image_size 224, storage fp16, flip false (METHOD 2).
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
    """pil: exact; dali: faster, differs by a little (sfd_fast.data.dali says how little)"""
    on_bad: Literal["skip", "fail"] = "skip"
    """unreadable images"""
    num_threads: int = 0
    """decoding threads of a rank; 0: one per processor"""
    device: str = "auto"
    """auto: the rank's GPU, or else the CPU"""
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "grid_size", "shard_size", "batch_size")
        require(self.num_threads >= 0, f"num_threads {self.num_threads} must not be negative")


@dataclass(frozen=True)
class EncodeConfig:
    """Latents of a folder of images, to train SFD on. Defaults: the released settings, stored in bf16."""

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
    on_bad: Literal["skip", "fail"] = "skip"
    num_threads: int = 0
    device: str = "auto"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "shard_size", "batch_size")
        require(self.num_threads >= 0, f"num_threads {self.num_threads} must not be negative")


def run_features(config: FeaturesConfig) -> None:
    """Writes shards of VFM features (feats_dino, labels) with their manifest into config.out."""
    from sfd_fast.models.vfm import load_vfm

    require(bool(config.images), "images is empty: give the folder of images")
    ranks = Ranks.from_environment()
    device = device_of(config.device, ranks)
    vfm = load_vfm(config.vfm, grid_size=config.grid_size).to(device)
    run(config, FeatureEncoder(vfm, dtype=STORAGE[config.storage], flip=config.flip), "features", ranks, device)


def run_encode(config: EncodeConfig) -> None:
    """Writes latent shards with statistics and manifest into config.out."""
    from sfd_fast.checkpoint import load_semvae
    from sfd_fast.models.diffusers_codec import load_codec
    from sfd_fast.models.vfm import load_vfm

    for name in ("images", "texture_codec", "semvae"):
        require(bool(getattr(config, name)), f"{name} is empty: `sfd encode` needs images, texture_codec and semvae")
    ranks = Ranks.from_environment()
    device = device_of(config.device, ranks)
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


def device_of(name: str, ranks: Ranks) -> torch.device:
    """The device called `name`; auto is cuda:LOCAL_RANK where there is CUDA."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def run(
    config: FeaturesConfig | EncodeConfig,
    encoder: FeatureEncoder | LatentEncoder,
    kind: Literal["features", "latents"],
    ranks: Ranks,
    device: torch.device,
    report: Callable[[str], None] = print,
) -> None:
    """Screens the images, encodes this rank's shards that are not there yet, and completes the manifest (rank 0)."""
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
    ranks.on_first(lambda: begin(out, settings))
    manifest = begin(out, settings)
    if manifest["complete"]:
        if ranks.first:
            report(f"{out} is complete: {len(index)} images")
        return
    job = Job(out, index, encoder, manifest["fingerprint"], config, num_threads, device)
    job.encode_shards([k for k in ranks.mine(job.num_shards) if not job.is_done(k)], ranks, report)
    ranks.barrier()
    ranks.on_first(lambda: job.finish(manifest, kind))
    if ranks.first:
        report(f"{out}: {len(index)} images in {job.num_shards} shards")


@dataclass(frozen=True)
class Job:
    """One cache in the making. A shard is done when both the shard and its record (NAME.json) are there."""

    out: Path
    index: ImageIndex
    encoder: FeatureEncoder | LatentEncoder
    fingerprint: str
    config: FeaturesConfig | EncodeConfig
    num_threads: int
    device: torch.device

    @property
    def num_shards(self) -> int:
        return -(-len(self.index) // self.config.shard_size)

    def path(self, k: int) -> Path:
        return self.out / f"shard-{k:05d}.safetensors"

    def record_path(self, k: int) -> Path:
        return self.path(k).with_suffix(".json")

    def images(self, k: int) -> range:
        """Numbers of the images of shard k."""
        return range(k * self.config.shard_size, min((k + 1) * self.config.shard_size, len(self.index)))

    def is_done(self, k: int) -> bool:
        return self.path(k).is_file() and self.record_path(k).is_file()

    def encode_shards(self, shards: list[int], ranks: Ranks, report: Callable[[str], None]) -> None:
        """Encodes those shards one after the other; decoding runs ahead across their borders."""
        batches = [(k, batch) for k in shards for batch in split(self.images(k), self.config.batch_size)]
        decoded = decoded_batches(
            self.index,
            [list(batch) for _, batch in batches],
            self.config.image_size,
            crop=self.config.crop,
            decoder=self.config.decoder,
            device=self.device,
            num_threads=self.num_threads,
        )
        progress = Progress(sum(len(self.images(k)) for k in shards), ranks, report)
        for k in shards:
            for stale in self.out.glob(f".{self.path(k).name}.*.tmp"):
                stale.unlink()
            self.encode_shard(k, decoded, progress)

    def encode_shard(self, k: int, decoded: Iterator[Tensor], progress: Progress) -> None:
        images = self.images(k)
        layout = {name: (dtype, (len(images), *shape)) for name, (dtype, shape) in self.encoder.layout().items()}
        layout["labels"] = (torch.int64, (len(images),))
        cosine = 0.0
        metadata = {"fingerprint": self.fingerprint, "first_image": images.start}
        with ShardWriter(self.path(k), layout, metadata) as writer:
            labels = torch.from_numpy(self.index.labels[images.start : images.stop].astype("int64"))
            writer.write("labels", 0, labels)
            for batch in split(images, self.config.batch_size):
                rows, cosines = self.encode_batch(next(decoded), batch)
                for name, values in rows.items():
                    writer.write(name, batch.start - images.start, values[: len(batch)])
                if cosines is not None:
                    cosine += float(cosines[:, : len(batch)].double().mean(0).sum())
                progress.add(len(batch))
        write_json(self.record_path(k), self.record(k, cosine))

    def encode_batch(self, pixels: Tensor, batch: range) -> tuple[dict[str, Tensor], Tensor | None]:
        """Pads to the fixed size by repeating the last image: fp32 results depend on the batch size."""
        pad = self.config.batch_size - len(batch)
        pixels = torch.cat([pixels, pixels[-1:].expand(pad, -1, -1, -1)]) if pad else pixels
        ids = torch.tensor([*batch, *[batch[-1]] * pad])
        low = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext():
            return self.encoder(pixels.to(self.device), ids.to(self.device))

    def record(self, k: int, cosine: float) -> dict:
        """Count, checksum and statistics of a written shard, from what the file holds.

        Raises ValueError naming the image whose latents are not finite.
        """
        path = self.path(k)
        tensors = map_tensors(path, read_header(path))
        record = {"count": len(self.images(k)), "bytes": path.stat().st_size, "sha256": checksum(path)}
        for stream, name in (("texture", "latents"), ("texture", "latents_mean"), ("semantic", "latents_sv")):
            if name in tensors:
                moments = self.moments(k, name, tensors[name])
                if name == "latents_mean":
                    moments = moments.with_noise(tensors["latents_logvar"])
                record[stream] = moments.to_json()
        for name in ("latents_flip", "latents_mean_flip", "latents_sv_flip", "feats_dino", "feats_dino_flip"):
            if name in tensors:
                self.moments(k, name, tensors[name])
        if "semantic" in record:
            record["cosine"] = cosine
        return record

    def moments(self, k: int, name: str, values: Tensor) -> ChannelMoments:
        try:
            return ChannelMoments.of(values)
        except ValueError as error:
            sample = int(torch.isfinite(values.float()).flatten(1).all(1).logical_not().nonzero()[0])
            image = self.index.describe(self.images(k)[sample])
            raise ValueError(
                f"{self.path(k)}: '{name}' of {image}: {error}. Use precision fp32, storage bf16 or fp32 (fp16 ends "
                "at 65504), and check the encoder's weights"
            ) from None

    def finish(self, manifest: dict, kind: str) -> None:
        """Merges the shards' records in their order, writes statistics and the final manifest, removes the records."""
        records = {self.path(k).name: json.loads(self.record_path(k).read_text()) for k in range(self.num_shards)}
        labels = torch.from_numpy(self.index.labels.astype("int64"))
        per_class = torch.bincount(labels, minlength=len(self.index.classes)).tolist()
        manifest = manifest | {
            "complete": True,
            "count": len(self.index),
            "classes": self.index.classes,
            "class_counts": per_class,
            "shards": {name: {key: r[key] for key in ("count", "bytes", "sha256")} for name, r in records.items()},
            "bytes_per_image": sum(r["bytes"] for r in records.values()) / len(self.index),
        }
        if kind == "latents":
            texture, semantic = (
                merge_all(ChannelMoments.from_json(r[stream]) for r in records.values())
                for stream in ("texture", "semantic")
            )
            LatentStatistics.from_moments(texture, semantic).save(self.out)
            manifest["statistics"] = {
                stream: {"count": m.count, "mean": m.mean.tolist(), "std": m.std().tolist()}
                for stream, m in (("texture", texture), ("semantic", semantic))
            }
            manifest["semvae_target_cosine"] = sum(r["cosine"] for r in records.values()) / len(self.index)
        write_json(self.out / MANIFEST, manifest)
        for k in range(self.num_shards):
            self.record_path(k).unlink()


def split(numbers: range, size: int) -> list[range]:
    """Consecutive parts of at most `size` numbers."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
