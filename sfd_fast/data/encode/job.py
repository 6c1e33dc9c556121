"""One cache in the making, by all ranks together: shards, their records, the final manifest, and its repair.

While it is made, every finished shard has a record beside it (NAME.json: count, checksum, statistics). The last step
merges the records into the manifest and removes them.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sfd_fast.data.cache import layout
from sfd_fast.data.cache.manifest import MANIFEST, begin, check_place, read_manifest, shard_name
from sfd_fast.data.cache.shards import ShardWriter, map_tensors, read_header, write_json
from sfd_fast.data.encode.encoders import FeatureEncoder, LatentEncoder
from sfd_fast.data.encode.options import RELEASED, CacheOptions
from sfd_fast.data.images.batches import decoded_batches
from sfd_fast.data.images.decode import colour
from sfd_fast.data.images.index import INDEX_FOLDER, ImageIndex
from sfd_fast.data.images.opening import open_index, traits_of
from sfd_fast.data.progress import Progress
from sfd_fast.diffusion.statistics import (
    FILES,
    PARTS,
    ChannelMoments,
    LatentStatistics,
    first_not_finite,
    merge_all,
)
from sfd_fast.files.atomic import sweep
from sfd_fast.files.digest import file_digest
from sfd_fast.files.lock import FolderLock
from sfd_fast.ranks import Ranks, launch_name

Report = Callable[[str], None]


ROW = ("count", "bytes", "sha256", "images", "cosine", "dali_failures")
"""what the manifest keeps of a shard's record"""
STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make_cache(
    config: CacheOptions, encoder: FeatureEncoder | LatentEncoder, ranks: Ranks, report: Report = print
) -> None:
    """Screens the images, then encodes the shards that are not there or damaged; all ranks together.

    Images are numbered by the screened index. Shard k holds the images k * shard_size and on, whatever the number of
    ranks, and is encoded in batches of one fixed size (the last one padded), so every run gives the same bytes. Run
    again over a finished folder, it encodes only shards that are missing or damaged.
    Raises BlockingIOError where another command works in the folder.
    """
    out, advice = Path(config.out), "choose another folder with --out"
    command = "sfd features" if encoder.kind == "features" else "sfd encode"
    check_place(out, config.images)
    with (
        FolderLock(out, command=command, launch=launch_name(), advice=advice, clean=lambda: sweep(out)),
        ranks.together(),
    ):
        begin_cache(config, encoder, ranks, report).run(ranks, report)


def begin_cache(
    config: CacheOptions, encoder: FeatureEncoder | LatentEncoder, ranks: Ranks, report: Report
) -> "CacheJob":
    """The images' index and the folder's manifest, opened or made."""
    out = Path(config.out)
    num_threads = config.num_threads or os.cpu_count() or 1
    device = ranks.device(config.device)
    index = open_index(
        config.images, out / INDEX_FOLDER, on_bad=config.on_bad, num_threads=num_threads, ranks=ranks, report=report,
        update=config.update,
    )  # fmt: skip
    if ranks.first:
        for line in traits_of(index, config.background):
            report(line)
    if not config.shard_size:
        begun = ranks.on_first(lambda: read_manifest(out)) or {}
        usual = 1024 if device.type == "cuda" else 64
        config = replace(config, shard_size=begun.get("settings", {}).get("shard_size", usual))
    settings = {
        "kind": encoder.kind,
        "images": index.fingerprint(),
        "num_images": len(index),
        "image_size": config.image_size,
        "crop": config.crop,
        "background": config.background,
        "decoder": config.decoder,
        "flip": config.flip,
        "storage": config.storage,
        "precision": config.precision,
        "shard_size": config.shard_size,
    } | encoder.settings()
    sources = {name: located(getattr(config, name)) for name in (*encoder.parts, "images")}
    manifest = ranks.on_first(lambda: begin(out, settings, sources, update=config.update))
    return CacheJob(out, index, encoder, manifest, config, num_threads, device)


def located(source: str) -> str:
    """The absolute path of what is on this disk; other names as they are."""
    return str(Path(source).absolute()) if Path(source).exists() else source


@dataclass(frozen=True)
class CacheJob:
    """One cache. A shard is done when the shard and its record are there, and the shard has the recorded size."""

    out: Path
    index: ImageIndex
    encoder: FeatureEncoder | LatentEncoder
    manifest: dict
    """as it was when this run began"""
    config: CacheOptions
    num_threads: int
    device: torch.device
    failed: set[int] = field(default_factory=set)
    """first images of the batches in which DALI failed"""

    @property
    def num_shards(self) -> int:
        return -(-len(self.index) // self.config.shard_size)

    def path(self, k: int) -> Path:
        return self.out / shard_name(k)

    def record_path(self, k: int) -> Path:
        return self.path(k).with_suffix(".json")

    def images(self, k: int) -> range:
        """Numbers of the images of shard k."""
        return range(k * self.config.shard_size, min((k + 1) * self.config.shard_size, len(self.index)))

    def recorded(self, k: int) -> dict | None:
        """The record of a shard that this or an earlier run made of the same images, None where there is none."""
        path = self.record_path(k)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
            return record if record["images"] == self.index.fingerprint(self.images(k)) else None
        except (ValueError, KeyError, TypeError):  # damaged: the shard is encoded again
            return None

    def is_whole(self, k: int, row: dict | None) -> bool:
        """Whether shard k has the size, and if asked for the checksum, of `row` (its record, or of the manifest)."""
        path = self.path(k)
        if row is None or not path.is_file() or path.stat().st_size != row["bytes"]:
            return False
        return not self.config.verify or file_digest(path) == row["sha256"]

    def encode_missing(self, row_of: Callable[[int], dict | None], ranks: Ranks, report: Report) -> list[int]:
        """Encodes, divided over the ranks, all shards that are not as row_of(k) says; returns once all are there."""
        mine = [k for k in ranks.mine(self.num_shards) if not self.is_whole(k, row_of(k))]
        missing = sorted(k for share in ranks.gather(mine) for k in share)
        if missing and ranks.first and len(missing) < self.num_shards:
            report(
                f"{self.out}: {len(missing)} of {self.num_shards} shards are missing or damaged and are encoded, the "
                f"first is {self.path(missing[0]).name}"
            )
        self.encode_shards([missing[i] for i in ranks.mine(len(missing))], ranks, report)
        ranks.meet()
        return missing

    def run(self, ranks: Ranks, report: Report) -> None:
        """Encodes what is not there yet, or repairs what is finished."""
        if self.manifest["complete"]:
            self.repair(self.manifest, ranks, report)
            return
        for k in ranks.mine(self.num_shards):
            self.adopt(k)
        ranks.meet()
        self.encode_missing(self.recorded, ranks, report)
        ranks.on_first(lambda: self.finish(self.manifest, report))

    def adopt(self, k: int) -> None:
        """Takes a shard over from the cache as it was before an update, where its images are the same."""
        row = self.manifest.get("previous", {}).get(self.path(k).name)
        if row is None or self.recorded(k) is not None or not self.is_whole(k, row):
            return
        if row.get("images") == self.index.fingerprint(self.images(k)):
            record = self.record(k, row.get("cosine"))
            if record["sha256"] == row["sha256"]:
                write_json(self.record_path(k), record | {key: row[key] for key in ("dali_failures",) if key in row})

    def repair(self, manifest: dict, ranks: Ranks, report: Report) -> None:
        """Encodes those shards of a finished cache again that are missing or damaged, to the bytes that it lists.

        Raises ValueError naming a shard that this machine encodes to other bytes; it is then removed again.
        """
        listed = manifest["shards"]

        def row_of(k: int) -> dict | None:
            row, record = listed[self.path(k).name], self.recorded(k)
            # a record here is of a repair that was killed before it compared
            return row if record is None or record["sha256"] == row["sha256"] else None

        missing = self.encode_missing(row_of, ranks, report)
        ranks.on_first(lambda: self.finish_repair(manifest, missing, report))

    def finish_repair(self, manifest: dict, missing: list[int], report: Report) -> None:
        for k in missing:
            path, sha256 = self.path(k), manifest["shards"][self.path(k).name]["sha256"]
            found = self.recorded(k)["sha256"]
            if found != sha256:
                path.unlink()
                self.record_path(k).unlink()
                raise ValueError(
                    f"{path} was encoded again to other bytes than {self.out / MANIFEST} lists ({found[:12]}... "
                    f"instead of {sha256[:12]}...): this machine or these library versions round differently. Repair "
                    "the cache where it was made, copy the shard from there, or encode everything into another folder"
                )
        listed = manifest.get("statistics", {})
        if any(listed[part]["mean"] and not (self.out / name).is_file() for part, name in zip(PARTS, FILES) if listed):
            values = (listed[part][name] for part in PARTS for name in ("mean", "std"))
            LatentStatistics(*map(torch.tensor, values)).save(self.out)
            report(f"{self.out}: statistics written again from the manifest")
        self.tidy()
        report(f"{self.out} is complete: {len(self.index)} images in {self.num_shards} shards")

    def tidy(self) -> None:
        """Removes what a finished cache does not need: records, and temporary files of killed processes."""
        for path in self.out.glob("shard-*.json"):
            path.unlink()
        kept = {self.path(k).name for k in range(self.num_shards)}
        for name in self.manifest.get("previous", {}):  # an update may need fewer shards
            if name not in kept:
                (self.out / name).unlink(missing_ok=True)
        for folder in (self.out, self.out / INDEX_FOLDER):
            sweep(folder)

    def encode_shards(self, shards: list[int], ranks: Ranks, report: Report) -> None:
        """Encodes those shards one after the other; decoding runs ahead across their borders."""
        batches = [(k, batch) for k in shards for batch in split(self.images(k), self.config.batch_size)]
        decoded = decoded_batches(
            self.index,
            [list(batch) for _, batch in batches],
            self.config.image_size,
            crop=self.config.crop,
            background=None if self.config.background == RELEASED else colour(self.config.background),
            decoder=self.config.decoder,
            device=self.device,
            num_threads=self.num_threads,
            on_failure=lambda batch: self.failed.add(batch[0]),
        )
        progress = Progress("encoding", sum(len(self.images(k)) for k in shards), ranks, report)
        for k in shards:
            ranks.check()
            self.encode_shard(k, decoded, progress)

    def encode_shard(self, k: int, decoded: Iterator[Tensor], progress: Progress) -> None:
        images = self.images(k)
        tensors = {name: (dtype, (len(images), *shape)) for name, (dtype, shape) in self.encoder.layout().items()}
        tensors[layout.LABELS] = (torch.int64, (len(images),))
        cosine = None
        metadata = {"fingerprint": self.manifest["fingerprint"], "first_image": images.start}
        with ShardWriter(self.path(k), tensors, metadata) as writer:
            labels = torch.from_numpy(self.index.labels[images.start : images.stop].astype("int64"))
            writer.write(layout.LABELS, 0, labels)
            for batch in split(images, self.config.batch_size):
                rows, cosines = self.encode_batch(next(decoded), batch)
                for name, values in rows.items():
                    writer.write(name, batch.start - images.start, values[: len(batch)])
                if cosines is not None:
                    cosine = (cosine or 0.0) + float(cosines[:, : len(batch)].double().mean(0).sum())
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

    def record(self, k: int, cosine: float | None) -> dict:
        """Count, checksum and statistics of a written shard, from what the file holds.

        Raises ValueError naming the image whose latents are not finite.
        """
        path = self.path(k)
        tensors = map_tensors(path, read_header(path))
        for name, values in tensors.items():
            bad = first_not_finite(values)
            if bad is not None:
                raise ValueError(
                    f"{path}: '{name}' of {self.index.describe(self.images(k)[bad])} holds NaN or infinity. Use "
                    "precision fp32, storage bf16 or fp32 (fp16 ends at 65504), and check the encoder's weights"
                )
        images = self.images(k)
        record = {"count": len(images), "bytes": path.stat().st_size, "sha256": file_digest(path)}
        record["images"] = self.index.fingerprint(images)
        if self.encoder.kind == "latents":
            record |= {part: moments.to_json() for part, moments in zip(PARTS, layout.moments(tensors))}
        if cosine is not None:
            record["cosine"] = cosine
        if self.config.decoder == "dali":
            record["dali_failures"] = sum(image in images for image in self.failed)
        return record

    def finish(self, manifest: dict, report: Report) -> None:
        """Merges the shards' records in their order, writes statistics and the final manifest, removes the records."""
        records = {self.path(k).name: self.recorded(k) for k in range(self.num_shards)}
        labels = torch.from_numpy(self.index.labels.astype("int64"))
        per_class = torch.bincount(labels, minlength=len(self.index.classes)).tolist()
        manifest = {key: value for key, value in manifest.items() if key != "previous"} | {
            "complete": True,
            "count": len(self.index),
            "classes": self.index.classes,
            "class_counts": per_class,
            "shards": {name: {key: r[key] for key in ROW if key in r} for name, r in records.items()},
            "bytes_per_image": sum(r["bytes"] for r in records.values()) / len(self.index),
        }
        if self.encoder.kind == "latents":
            moments = [merge_all(ChannelMoments.from_json(r[part]) for r in records.values()) for part in PARTS]
            LatentStatistics.from_moments(*moments).save(self.out)
            manifest["statistics"] = {
                part: {"count": m.count, "mean": m.mean.tolist(), "std": m.std().tolist()}
                for part, m in zip(PARTS, moments)
            }
            if all("cosine" in r for r in records.values()):
                manifest["semvae_target_cosine"] = sum(r["cosine"] for r in records.values()) / len(self.index)
        if self.config.decoder == "dali":
            manifest["dali_failures"] = sum(r["dali_failures"] for r in records.values())
        write_json(self.out / MANIFEST, manifest)
        self.tidy()
        report(f"{self.out}: {len(self.index)} images in {self.num_shards} shards")
        if manifest.get("dali_failures"):
            report(f"  {manifest['dali_failures']} batches were decoded with PIL because DALI failed in them")


def split(numbers: range, size: int) -> list[range]:
    """Consecutive parts of at most `size` numbers."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
