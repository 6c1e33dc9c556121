"""Cached latents: memory-mapped shards, and gathers of any of their samples.

Letters: N samples of the set, B samples of a gather, C channels, H, W, F width and h, w grid of features.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfd_fast.data.cache import layout
from sfd_fast.data.cache.manifest import read_manifest
from sfd_fast.data.cache.remote import open_shards
from sfd_fast.data.cache.shards import map_tensors
from sfd_fast.data.load.held_out import Part, SampleSet
from sfd_fast.data.load.rows import MappedMemory, Places, RowTable, RunTable
from sfd_fast.diffusion.statistics import FILES, PARTS, ChannelMoments, LatentStatistics, first_not_finite
from sfd_fast.diffusion.transport import split_latents
from sfd_fast.files.home import with_home

Batch = dict[str, Tensor]
log = logging.getLogger(__name__)


class LatentShards(SampleSet):
    """A cache of latents, of the released layout or ours (docs/METHOD.md 6): the same safetensors files.

    paths: a folder, files, or a list of them; fsspec addresses (s3://, gs://, hf://, memory://) are copied into
    `cache_folder` first. semantic_channels: how many of the last channels the model calls semantic: a cache of both PCA
    and SemVAE latents leaves open whether PCA counts as such, which it does otherwise. Memory: the page cache, and
    nothing per sample.
    Raises ValueError naming the file where a shard is truncated, or differs from the first in keys, shapes or dtypes;
    FileNotFoundError where a file of the manifest is missing.
    """

    @with_home
    def __init__(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        cache_folder: str | Path | None = None,
        semantic_channels: int | None = None,
    ):
        self.folder, self.paths, headers = open_shards(paths, cache_folder)
        layout.check_alike(self.paths, headers)
        self.metadata = headers[0].metadata
        first = headers[0].entries
        self._ends = np.cumsum([header.entries[layout.LABELS].shape[0] for header in headers])
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self._part = Part(0, int(self._ends[-1]))
        if not len(self):
            raise ValueError(f"{self.folder} is a cache of no samples: encode images into it (`sfd encode`)")
        maps = [map_tensors(path, header) for path, header in zip(self.paths, headers)]

        def table(key: str) -> RowTable:
            flipped = [tensors[key + layout.FLIP] for tensors in maps] if key + layout.FLIP in first else None
            return RowTable(memory, [tensors[key] for tensors in maps], flipped)

        memory = MappedMemory(tensor for tensors in maps for tensor in tensors.values())
        names, others = layout.composite_keys(first), (layout.LABELS, layout.FEATURES, layout.TEXTURE_LOGVAR)
        self._memory = memory
        self._tables = {name: table(name) for name in (*names, *others) if name in first}
        self._composite = [self._tables[name] for name in names]
        self._labels, self._features, self._logvar = map(self._tables.get, others)
        self._runs = RunTable(memory, self._composite) if RunTable.fits(self._composite) else None
        self.dtype, self.grid = self._composite[0].dtype, self._composite[0].shape[1:]
        self.channels = sum(rows.shape[0] for rows in self._composite)
        all_semantic = self.channels - self._composite[0].shape[0]
        is_open = {layout.PCA, layout.SEMANTIC} <= first.keys()
        fitting = semantic_channels == first[layout.SEMANTIC].shape[1] if is_open else False
        self.semantic_channels = semantic_channels if fitting else all_semantic
        self.texture_channels = self.channels - self.semantic_channels
        self.has_flips = all(rows.has_flips for rows in (*self._composite, self._logvar) if rows)

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        """(F, h, w) of the stored VFM features, None where the cache has none."""
        return self._features.shape if self._features else None

    def says_flips(self) -> bool:
        """Whether the cache has mirrored samples; says once where it has none."""
        if not self.has_flips:
            log.info("%s has no mirrored samples: plain ones alone are shown", self.folder)
        return self.has_flips

    def require(self, *, flip: bool, features: bool) -> None:
        """Raises ValueError where mirrored samples or VFM features are asked for and the cache has none."""
        if flip and not self.has_flips:
            raise ValueError(
                f"{self.paths[0]} has no flipped latents (latents_flip, latents_sv_flip): set data.flip to false, or "
                "encode both flips (`sfd encode --flip true`)"
            )
        if features and self._features is None:
            raise ValueError(
                f"{self.paths[0]} has no VFM features ({layout.FEATURES}), which REPA needs: set data.targets to "
                "semvae or online, encode them (`sfd encode --features true`), or set transport.repa_weight to 0"
            )
        if flip and features and not self._features.has_flips:
            raise ValueError(
                f"{self.paths[0]} has flipped latents but no flipped VFM features ({layout.FEATURES}{layout.FLIP}): "
                "mirrored latents would be aligned with features of the plain image; set data.flip to false, or encode "
                "both flips"
            )

    @property
    def max_label(self) -> int:
        """The largest label of the whole cache. Raises ValueError naming the shard with one that is no class number."""
        return max(layout.largest_label(path, self._labels.shard(k)) for k, path in enumerate(self.paths))

    def shard_moments(self, k: int) -> tuple[ChannelMoments, ChannelMoments]:
        """Moments of the unflipped (latents, latents_sv) of shard k, whole whatever the part.

        Raises ValueError naming the shard where a value is not finite.
        """
        try:
            return layout.moments({name: table.shard(k) for name, table in self._tables.items()})
        except ValueError as error:
            raise ValueError(f"{self.paths[k]}: {error}") from None

    def statistics(self, multiplier: float = 1.0) -> LatentStatistics:
        """The statistics beside the cache. Raises ValueError where they have other channel counts than the latents."""
        pca = self._tables[layout.PCA].shape[0] if layout.PCA in self._tables else 0
        statistics = LatentStatistics.load(
            self.folder, multiplier, semantic=layout.SEMANTIC in self._tables, pca_channels=pca
        )
        self._check_listed(statistics)
        if pca and statistics.texture_channels + statistics.semantic_channels == self.channels:
            statistics = statistics.divided_at(self.texture_channels)
        have = (statistics.texture_channels, statistics.semantic_channels)
        if have != (self.texture_channels, self.semantic_channels):
            raise ValueError(
                f"statistics in {self.folder} are of {have[0]} + {have[1]} channels, its latents have "
                f"{self.texture_channels} + {self.semantic_channels}: they come from different caches"
            )
        return statistics

    def _check_listed(self, statistics: LatentStatistics) -> None:
        """Raises ValueError where the statistics beside the cache are not those that its manifest lists."""
        listed = (read_manifest(self.folder) or {}).get("statistics", {})
        for part, name in zip(PARTS, FILES):
            for kind in ("mean", "std"):
                want = torch.tensor(listed[part][kind] if part in listed else [], dtype=torch.float32)
                have = getattr(statistics, f"{part}_{kind}")
                if len(want) and not (len(want) == len(have) and torch.allclose(want, have, rtol=1e-4, atol=1e-6)):
                    raise ValueError(
                        f"{Path(self.folder, name)} is not of this cache: its manifest lists other values ({part} "
                        f"{kind}); delete the file and run the command that made the cache again, which writes it"
                    )

    def gather(self, indices: Tensor, flip: Tensor, *, features: bool | None = None) -> Batch:
        """The stored values of some samples, copied.

        indices: (B,) int64 in 0 .. N - 1; flip: (B,) bool, which of them are read flipped; features: False leaves them
        out where the cache has them.
        Returns {"texture": (B, C_t, H, W), "semantic": (B, C_s, H, W), "labels": (B,) int64} in the stored dtype,
        "features" (B, F, h, w) where the cache has them, and "texture_logvar" where it holds moments (texture is then
        the posterior's mean). Raises IndexError, or ValueError where flips are asked for and not stored.
        """
        self.require(flip=bool(flip.any()), features=False)
        slot = self.slot(len(indices), features=self._features is not None and features is not False)
        self.fill(slot, self.locate(indices, flip))
        texture, semantic = split_latents(slot["latents"], self.texture_channels)
        out = {"texture": texture, "semantic": semantic, "labels": slot["labels"].long()}
        renamed = {"features": "features", "logvar": "texture_logvar"}
        return out | {name: slot[key] for key, name in renamed.items() if key in slot}

    def slot(self, size: int, *, features: bool, pinned: bool = False) -> Batch:
        """Host memory for one batch as it is stored; the latents are one raw composite."""
        shapes = {
            "latents": ((self.channels, *self.grid), self.dtype),
            "labels": ((), self._labels.dtype),
            "sample_ids": ((), torch.int64),
        }
        if self._logvar:
            shapes["logvar"] = (self._logvar.shape, self._logvar.dtype)
        if features:
            shapes["features"] = (self._features.shape, self._features.dtype)
        return {
            name: torch.empty((size, *shape), dtype=dtype, pin_memory=pinned) for name, (shape, dtype) in shapes.items()
        }

    def locate(self, indices: Tensor, flip: Tensor) -> Places:
        """Where samples lie. indices, flip: of one shape, as in gather. Raises IndexError outside the set."""
        positions = indices.numpy()
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"sample indices {positions.min()} to {positions.max()}; there are {len(self)} samples")
        positions = self._part.numbers(positions)
        shards = np.searchsorted(self._ends, positions, side="right")
        places = Places(shards, positions - self._starts[shards], flip.numpy())
        return places if self._runs is None else replace(places, runs=self._runs.numbers(places))

    def fill(self, slot: Batch, places: Places) -> None:
        """Copies the samples that `locate` found, (B,), into a slot of B."""
        if self._runs is not None:
            self._runs.gather(places, slot["latents"])
        else:
            parts = slot["latents"].split([table.shape[0] for table in self._composite], dim=1)
            for table, part in zip(self._composite, parts):
                table.gather(places, part)
        for name, table in (("features", self._features), ("logvar", self._logvar)):
            if name in slot:
                table.gather(places, slot[name])
        self._labels.gather(places, slot["labels"])

    def flaw(self, indices: Tensor, flip: Tensor, *, features: bool) -> str:
        """The first of some samples that is not finite as it is stored, with file and row; "" where all are finite."""
        slot, places = self.slot(len(indices), features=features), self.locate(indices, flip)
        self.fill(slot, places)
        for name in ("latents", "logvar", "features"):
            i = first_not_finite(slot[name]) if name in slot else None
            if i is not None:
                view, path = "mirrored " if places.flip[i] else "", self.paths[places.shards[i]]
                return f"{path}: the {view}{name} of sample {places.rows[i]} hold NaN or infinity"
        return ""
