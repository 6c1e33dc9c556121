"""What a cache tells of the model to be trained on it: channels, grid, classes, width of features."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sfd_fast.data.cache import layout
from sfd_fast.data.cache.manifest import read_manifest
from sfd_fast.data.cache.remote import open_shards
from sfd_fast.data.cache.shards import map_tensors


@dataclass(frozen=True)
class CacheSizes:
    """Sizes of the samples of a cache. A cache of features alone has no latents: 0 channels."""

    texture_channels: int
    semantic_channels: int
    """PCA and SemVAE channels together"""
    grid_size: int
    num_classes: int
    """of the source, some of which may have no images; where no manifest tells, the largest label + 1"""
    trained_classes: tuple[int, ...] | None
    """labels that have images; None: the manifest does not tell"""
    feature_channels: int | None
    """F of the VFM features that are stored, or of the VFM that the latents were encoded with; None: nothing tells"""


def describe(paths: str | Path | Iterable[str | Path], cache_folder: str | Path | None = None) -> CacheSizes:
    """Sizes of a cache, from its first shard and its manifest; of one without a manifest all labels are read.

    Raises ValueError where there are no shards or naming a damaged one, FileNotFoundError for what is missing.
    """
    folder, files, headers = open_shards(paths, cache_folder)
    entries = headers[0].entries
    manifest = read_manifest(folder) or {}
    shapes = {name: entry.shape[1:] for name, entry in entries.items()}
    composite = layout.composite_keys(shapes)
    if not composite and layout.FEATURES not in shapes:
        raise ValueError(f"{files[0]} has neither latents nor features; it holds {', '.join(shapes) or 'nothing'}")
    counts = [shapes[name][0] for name in composite] or [0]
    grid = shapes[composite[0] if composite else layout.FEATURES][-1]
    width = shapes[layout.FEATURES][0] if layout.FEATURES in shapes else manifest.get("settings", {}).get("vfm_width")
    if "class_counts" in manifest:
        per_class = manifest["class_counts"]
        classes, trained = len(per_class), tuple(i for i, count in enumerate(per_class) if count)
    else:
        labels = [map_tensors(path, header).get(layout.LABELS) for path, header in zip(files, headers)]
        largest = max(layout.largest_label(path, part) for path, part in zip(files, labels) if part is not None)
        classes, trained = 1 + largest, None
    return CacheSizes(counts[0], sum(counts[1:]), grid, classes, trained, width)
