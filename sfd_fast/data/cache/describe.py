"""What a cache tells of the model to be trained on it: channels, grid, classes and their names, width of features."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfd_fast.config import require
from sfd_fast.data.cache import layout
from sfd_fast.data.cache.manifest import read_manifest
from sfd_fast.data.cache.remote import open_shards
from sfd_fast.data.cache.shards import map_tensors
from sfd_fast.files.home import with_home
from sfd_fast.formats.imagenet import spelled_out


@dataclass(frozen=True)
class CacheSizes:
    """Sizes of the samples of a cache. A cache of features alone has no latents: 0 channels."""

    texture_channels: int
    semantic_channels: int
    """PCA and SemVAE channels together"""
    grid_size: int
    """of features alone: the side of their square; 0 where their number is no square"""
    num_classes: int
    """of the source, some of which may have no images; where no manifest tells, the largest label + 1, and 0 where
    there are no labels either"""
    trained_classes: tuple[int, ...] | None
    """labels that have images; None: the manifest does not tell"""
    feature_channels: int | None
    """F of the VFM features that are stored, or of the VFM that the latents were encoded with; None: nothing tells"""
    class_names: tuple[str, ...] | None = None
    """of every class in the order of the labels, ImageNet's in English; None: nothing tells, or they are its numbers"""
    texture_codec: str | None = None
    """what encoded the texture, as it was named; None: nothing tells"""


@with_home
def describe(paths: str | Path | Iterable[str | Path], cache_folder: str | Path | None = None) -> CacheSizes:
    """Sizes of a cache, from its first shard and its manifest; of one without a manifest all labels are read.

    Raises ValueError where there are no shards or naming a damaged one, FileNotFoundError for what is missing.
    """
    folder, files, headers = open_shards(paths, cache_folder)
    entries = headers[0].entries
    manifest = read_manifest(folder) or {}
    shapes = {name: entry.shape[1:] for name, entry in entries.items()}
    composite = layout.composite_keys(shapes)
    key = layout.feature_key(shapes)
    if not composite and key not in shapes:
        raise ValueError(f"{files[0]} has neither latents nor features; it holds {', '.join(shapes) or 'nothing'}")
    counts = [shapes[name][0] for name in composite] or [0]
    width, grid = manifest.get("settings", {}).get("vfm_width"), 0
    if key in shapes:
        require(len(shapes[key]) in (2, 3), f"{files[0]}: '{key}' must be (N, tokens, F) or (N, F, h, w)")
        width, grid = layout.feature_sizes(shapes[key])
    if composite:
        grid = shapes[composite[0]][-1]
    if "class_counts" in manifest:
        per_class = manifest["class_counts"]
        classes, trained = len(per_class), tuple(i for i, count in enumerate(per_class) if count)
    else:
        labels = [map_tensors(path, header).get(layout.label_key(shapes)) for path, header in zip(files, headers)]
        found = [layout.largest_label(path, part) for path, part in zip(files, labels) if part is not None]
        largest = max(found, default=-1)
        classes, trained = 1 + largest, None
    codec = manifest.get("sources", {}).get("texture_codec")
    return CacheSizes(counts[0], sum(counts[1:]), grid, classes, trained, width, class_names(manifest), codec)


def class_names(manifest: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of a manifest's classes for people; None where there are none but their numbers."""
    names = [str(name) for name in manifest.get("classes", ())]
    return None if names == [str(i) for i in range(len(names))] else tuple(spelled_out(names))
