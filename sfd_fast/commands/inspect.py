"""`sfd inspect PATH`: what a cache holds, whether it is whole, and a picture of its first images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfd_fast.config import Settings, require
from sfd_fast.config.checks import Count, FilePath
from sfd_fast.ranks import Ranks

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from sfd_fast.data.cache.shards import Header
    from sfd_fast.data.load.latents import LatentShards
    from sfd_fast.diffusion.statistics import ChannelMoments, LatentStatistics

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class InspectConfig(Settings):
    """What to show of a cache."""

    path: FilePath = ""
    """folder of shards: latents or features, the released layout or ours; the word alone will do: sfd inspect FOLDER"""
    cache_folder: FilePath = ""
    """local folder for the copy of a remote path (s3://, gs://, hf://)"""
    verify: bool = False
    """read everything: checksums against the manifest, NaN and infinity"""
    statistics: bool = False
    """compute the statistics exactly, over all unflipped latents, and write latents_stats.pt and latents_sv_stats.pt"""
    picture: FilePath = "auto"
    """PNG file for the first images; auto: inspect-FOLDER.png where the command runs (a cache is never written to);
    none: no picture"""
    texture_codec: FilePath = "auto"
    """decodes the picture; auto: the one that the cache was encoded with, where it lies where the manifest says; none:
    three principal components of the latents are shown as colours"""
    num_images: Count = 8
    overwrite: bool = False
    """draw over a picture that another program made"""


def run_inspect(config: InspectConfig, report: Callable[[str], None] = print) -> None:
    """Prints what config.path holds. Raises ValueError naming the file for whatever is wrong with it."""
    from sfd_fast import pictures
    from sfd_fast.data.cache import layout
    from sfd_fast.data.cache.remote import open_shards
    from sfd_fast.data.load.latents import LatentShards
    from sfd_fast.diffusion.statistics import SEMANTIC_FILE, TEXTURE_FILE, LatentStatistics
    from sfd_fast.files.overwrite import require_free

    require(bool(config.path), "path is empty: give the folder of a cache: sfd inspect FOLDER")
    folder, paths, headers = open_shards(config.path, config.cache_folder)
    if config.picture != NONE:
        require_free(picture_path(config, folder), pictures.is_ours, overwrite=config.overwrite)
    for line in describe(folder, paths, headers):
        report(line)
    if config.verify:
        verify(folder, paths, headers)
        report("every shard is whole: checksums agree with the manifest where there is one, all values are finite")
    if not layout.composite_keys(headers[0].entries):
        draw_features(config, folder, report)
        return
    shards = LatentShards(paths)
    if config.statistics:
        texture, semantic = cache_moments(shards)
        LatentStatistics.from_moments(texture, semantic).save(shards.folder)
        report(f"statistics of {len(shards)} samples written: {TEXTURE_FILE}, {SEMANTIC_FILE}")
    if Path(shards.folder, TEXTURE_FILE).is_file():
        for line in describe_statistics(shards.statistics()):
            report(line)
    else:
        report(f"no statistics yet: `sfd inspect {config.path} --statistics` computes them")
    if config.picture != NONE:
        save_picture(draw(shards, choose_codec(config, folder, report), config.num_images), config, folder, report)


def save_picture(rows: "list[np.ndarray]", config: InspectConfig, folder: Path, report: Callable[[str], None]) -> None:
    """Writes the rows of a picture, images of (B, H, W, 3) uint8, where config.picture says."""
    from sfd_fast import pictures

    if config.picture == NONE:
        return
    path = picture_path(config, folder)
    size = max(64, *(row.shape[1] for row in rows))
    images = [image for row in rows for image in row]
    try:
        pictures.save(path, pictures.tile(images, len(rows[0]), size=size, gap=0))
    except OSError as error:
        raise OSError(f"{error}; name another file with --picture, or none") from error
    report(f"picture: {path.absolute()}")


def draw_features(config: InspectConfig, folder: Path, report: Callable[[str], None]) -> None:
    """The picture of a cache of features alone. Raises ValueError for what holds no features either."""
    import torch

    from sfd_fast import pictures
    from sfd_fast.data.load.features import FeatureShards
    from sfd_fast.diffusion.transport import feature_map

    shards = FeatureShards(config.path, cache_folder=config.cache_folder)
    numbers = torch.arange(min(config.num_images, len(shards)))
    tokens = shards.gather(numbers, torch.zeros(len(numbers), dtype=torch.bool))
    if math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1]:
        report(f"no picture: {tokens.shape[1]} tokens are no square")
        return
    save_picture([pictures.principal_colours(feature_map(tokens).numpy())], config, folder, report)


def picture_path(config: InspectConfig, folder: Path) -> Path:
    return Path(f"inspect-{folder.resolve().name}.png" if config.picture == AUTO else config.picture)


def choose_codec(config: InspectConfig, folder: Path, report: Callable[[str], None]) -> "nn.Module | None":
    """The decoder of the picture, None for principal components; says what was chosen, and how to choose another."""
    from sfd_fast.data.cache.manifest import read_manifest
    from sfd_fast.files.digest import module_digest
    from sfd_fast.formats.texture import PIXELS, load_codec

    if config.texture_codec not in (AUTO, NONE):
        return load_codec(config.texture_codec)
    hint = "the picture shows principal components; --texture_codec PATH decodes it"
    manifest = read_manifest(folder)
    path = (manifest or {}).get("sources", {}).get("texture_codec", "")
    if config.texture_codec == NONE:
        hint = "the picture shows principal components"
    elif not path:
        hint = f"no manifest tells the texture codec: {hint}"
    elif not Path(path).exists() and not PIXELS.fullmatch(path):
        hint = f"the texture codec is not at {path} any more: {hint}"
    else:
        codec = load_codec(path)
        if module_digest(codec) == manifest["settings"]["texture_codec"]:
            report(f"decoded with the cache's own texture codec, {path}")
            return codec
        hint = f"{path} is not the texture codec any more that made the cache: {hint}"
    report(hint)
    return None


def describe(folder: Path, paths: list[str], headers: "list[Header]") -> list[str]:
    """Counts, tensors, labels and the manifest, as lines."""
    import numpy as np

    from sfd_fast.data.cache import layout
    from sfd_fast.data.cache.manifest import read_manifest
    from sfd_fast.data.cache.shards import map_tensors

    first = headers[0].entries
    counts = [next((entry.shape[0] for entry in header.entries.values() if entry.shape), 0) for header in headers]
    size = sum(header.size for header in headers)
    lines = [f"{folder}: {sum(counts)} samples in {len(paths)} shards, {size / 2**30:.3f} GiB, "
             f"{size / max(sum(counts), 1):.0f} bytes a sample"]  # fmt: skip
    for name, entry in sorted(first.items()):
        lines.append(f"  {name:<22} {str(entry.dtype).removeprefix('torch.'):<9} {entry.shape[1:]}")
    if layout.label_key(first) in first and sum(counts):
        key = layout.label_key(first)
        labels = np.concatenate([map_tensors(p, h)[key].numpy() for p, h in zip(paths, headers) if key in h.entries])
        classes, per_class = np.unique(labels, return_counts=True)
        lines.append(
            f"  {len(classes)} classes, labels {classes.min()} to {classes.max()}, {per_class.min()} to "
            f"{per_class.max()} samples each"
        )
    manifest = read_manifest(folder)
    if manifest is None:
        return [*lines, "  no manifest: a released cache, or shards copied without it"]
    lines.append("  manifest: complete")
    for name, value in manifest.get("settings", {}).items():
        shown = f"{value[:16]}..." if isinstance(value, str) and len(value) == 64 else value
        lines.append(f"    {name:<20} {shown}")
    for name, source in manifest.get("sources", {}).items():
        lines.append(f"    {name + ' from':<20} {source}")
    if manifest.get("dali_failures"):
        lines.append(f"    {manifest['dali_failures']} batches were decoded with PIL because DALI failed in them")
    if "semvae_target_cosine" in manifest:
        cosine = manifest["semvae_target_cosine"]
        lines.append(f"    cosine of `semvae` REPA targets with the true features: {cosine:.4f} ({meaning(cosine)})")
    return lines


def meaning(cosine: float) -> str:
    """What a cosine between decoded and true features tells of the SemVAE."""
    if cosine > 0.5:
        return "1 is perfect, 0 is chance"
    return (
        "1 is perfect, 0 is chance: this SemVAE does not know these features; train it longer, or give `sfd encode` "
        "the vfm that it was trained with"
    )


def describe_statistics(statistics: "LatentStatistics") -> list[str]:
    """Range of means and standard deviations of both parts."""
    from sfd_fast.diffusion.statistics import PARTS

    lines = []
    for part in PARTS:
        mean, std = getattr(statistics, f"{part}_mean"), getattr(statistics, f"{part}_std")
        if len(mean):
            lines.append(
                f"  {part}: {len(mean)} channels, means {mean.min():.4g} to {mean.max():.4g}, "
                f"standard deviations {std.min():.4g} to {std.max():.4g}"
            )
    return lines


def verify(folder: Path, paths: list[str], headers: "list[Header]") -> None:
    """Raises ValueError naming the first shard with a wrong checksum, or with values that are not finite."""
    from sfd_fast.data.cache.manifest import read_manifest
    from sfd_fast.data.cache.shards import map_tensors
    from sfd_fast.diffusion.statistics import first_not_finite
    from sfd_fast.files.digest import file_digest

    manifest = read_manifest(folder)
    for path, header in zip(paths, headers):
        listed = (manifest or {}).get("shards", {}).get(Path(path).name)
        if listed is not None and file_digest(path) != listed["sha256"]:
            raise ValueError(
                f"{path}: its checksum is not the manifest's: the file was damaged; copy it again, or run the command "
                "that made the cache again with --verify: it encodes only what is missing or damaged"
            )
        for name, values in map_tensors(path, header).items():
            bad = first_not_finite(values)
            if bad is not None:
                raise ValueError(f"{path}: '{name}': sample {bad} holds NaN or infinity")


def cache_moments(shards: "LatentShards", ranks: Ranks | None = None) -> "tuple[ChannelMoments, ChannelMoments]":
    """Exact moments of all unflipped latents (texture, semantic), the same bits for any number of ranks.

    Each rank takes whole shards; the parts are merged in the order of the shards.
    """
    from sfd_fast.diffusion.statistics import merge_all

    ranks = ranks or Ranks()
    mine = {k: shards.shard_moments(k) for k in ranks.mine(len(shards.paths))}
    parts: dict[int, tuple[ChannelMoments, ChannelMoments]] = {}
    for share in ranks.gather(mine):
        parts |= share
    ordered = [parts[k] for k in sorted(parts)]
    return merge_all(texture for texture, _ in ordered), merge_all(semantic for _, semantic in ordered)


def draw(shards: "LatentShards", codec: "nn.Module | None", num_images: int) -> "list[np.ndarray]":
    """First row: images decoded from texture, or its principal components; second row: semantics, likewise."""
    import torch

    from sfd_fast.models.texture import to_uint8
    from sfd_fast.pictures import principal_colours

    count = min(num_images, len(shards))
    raw = shards.gather(torch.arange(count), torch.zeros(count, dtype=torch.bool))
    if codec is None:
        rows = [principal_colours(raw["texture"].float().numpy())]
    else:
        require(
            codec.latent_channels == shards.texture_channels,
            f"the texture codec has {codec.latent_channels} latent channels, the cache {shards.texture_channels}: "
            "give the codec that it was encoded with, or --texture_codec none",
        )
        with torch.no_grad():
            rows = [to_uint8(codec.decode(raw["texture"].float())).numpy()]
    if shards.semantic_channels:
        rows.append(principal_colours(raw["semantic"].float().numpy()))
    return rows
