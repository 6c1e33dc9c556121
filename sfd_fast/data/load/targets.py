"""REPA targets y* that are not stored: decoded from the semantic latent, or computed by the VFM beside training.

stored: 393 KB an image and flip in the cache (released layout). semvae: nothing beyond the semantic latent that is
there anyway (8 KB), and one SemVAE decoder pass a step. online: nothing, and one VFM pass with decoding a step.
Letters: B batch, N tokens, F feature width, C channels, H, W.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn

from sfd_fast.config import DataConfig
from sfd_fast.config.checks import annotations, one_of
from sfd_fast.data.cache.manifest import read_manifest
from sfd_fast.data.encode.options import RELEASED
from sfd_fast.data.images.decode import colour, load
from sfd_fast.data.images.index import INDEX_FILE, INDEX_FOLDER, ImageIndex
from sfd_fast.data.load.latents import Batch, LatentShards
from sfd_fast.data.load.loader import LatentLoader
from sfd_fast.diffusion.statistics import LatentStatistics
from sfd_fast.diffusion.transport import feature_tokens, split_latents
from sfd_fast.files.digest import module_digest
from sfd_fast.files.home import with_home
from sfd_fast.formats.released_model import load_semvae
from sfd_fast.models.vfm import VFM, load_vfm


class Targets(Protocol):
    """Features of given samples: the target of the REPA head."""

    shape: tuple[int, int]
    """(N, F)"""
    fingerprint: str
    """of the weights that compute them: a run is continued with the same"""

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights."""

    def __call__(self, latents: Tensor, numbers: Tensor, flip: Tensor) -> Tensor:
        """latents: (B, C, H, W) normalised composite; numbers: (B,) int64 of the samples in the whole cache; flip: (B,)
        bool, both on the CPU.  Returns (B, N, F) float32 on the latents' device, without gradient."""

    def expect(self, numbers: Tensor) -> None:
        """The samples that will be asked for next, for what can be fetched ahead."""


class SemVAETargets:
    """y* = SemVAE decoder(semantic latent): what REPA learns from is what SemVAE kept of the features."""

    def __init__(self, semvae: nn.Module, statistics: LatentStatistics, num_tokens: int):
        self.semvae, self.statistics = semvae.eval().requires_grad_(False), statistics
        self.shape = (num_tokens, semvae.config.feature_channels)
        self.fingerprint = module_digest(semvae)

    def to(self, device: torch.device | str) -> "SemVAETargets":
        self.semvae, self.statistics = self.semvae.to(device), self.statistics.to(device)
        return self

    @torch.no_grad()
    def __call__(self, latents: Tensor, numbers: Tensor, flip: Tensor) -> Tensor:
        _, semantic = split_latents(latents, self.statistics.texture_channels)
        return self.semvae.decode(feature_tokens(self.statistics.denormalize_semantic(semantic.float()))).float()

    def expect(self, numbers: Tensor) -> None:
        pass


class OnlineTargets:
    """y* = VFM(image): exact, for caches without features; images are decoded by threads while the step before runs.

    Images are decoded by PIL, the exact crop, whatever decoder made the cache. settings: of the cache.
    """

    def __init__(self, vfm: VFM, index: ImageIndex, settings: Mapping, num_threads: int = 2):
        self.vfm, self.index = vfm, index
        background = settings["background"]
        self.view = (settings["image_size"], settings["crop"], None if background == RELEASED else colour(background))
        self.shape = (vfm.grid_size**2, vfm.width)
        self.fingerprint = module_digest(vfm)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="online")
        self._expected: dict[int, Future] = {}

    def to(self, device: torch.device | str) -> "OnlineTargets":
        self.vfm = self.vfm.to(device)
        return self

    def _decoded(self, number: int) -> Tensor:
        return load(self.index.read(number), *self.view)

    def expect(self, numbers: Tensor) -> None:
        """At most one batch is held."""
        self._expected = {int(i): self._pool.submit(self._decoded, int(i)) for i in numbers}

    def __call__(self, latents: Tensor, numbers: Tensor, flip: Tensor) -> Tensor:
        # held-out batches in between leave what the next training batch expects
        images = [self._expected.pop(i, None) or self._pool.submit(self._decoded, i) for i in numbers.tolist()]
        pixels = torch.stack([future.result() for future in images])
        pixels = torch.where(flip[:, None, None, None], pixels.flip(2), pixels)
        return self.vfm.features(pixels.to(latents.device)).float()


@with_home
def open_targets(
    kind: Literal["stored", "semvae", "online"],
    shards: LatentShards,
    statistics: LatentStatistics,
    *,
    semvae: str | Path = "",
    vfm: str | Path = "",
    images: str | Path = "",
    num_threads: int = 2,
) -> SemVAETargets | OnlineTargets | None:
    """The targets of a cache, on the CPU; None for stored ones, which the loader reads.

    semvae, vfm: as they were given to `sfd encode`; images: needed for online targets only where they moved;
    num_threads: that decode images for online targets.
    Raises ValueError for an unknown kind, and where the cache was made with another SemVAE, VFM or other images or its
    images cannot be read; FileNotFoundError where the cache came without the index of its images.
    """
    if kind == "stored":
        shards.require(flip=False, features=True)
        return None
    one_of("data.targets", kind, annotations(DataConfig)["targets"])
    settings = (read_manifest(shards.folder) or {}).get("settings", {})
    if kind == "semvae":
        if not semvae:
            raise ValueError("semvae targets need the SemVAE that the cache was encoded with: set data.semvae")
        if not shards.semantic_channels:
            raise ValueError(f"{shards.folder} has no semantic latents (latents_sv), which semvae targets decode")
        targets = SemVAETargets(load_semvae(semvae), statistics, int(shards.grid[0] * shards.grid[1]))
        _check_same(settings, "semvae", targets.fingerprint, shards.folder)
        if targets.semvae.config.latent_channels != shards.semantic_channels:
            raise ValueError(
                f"the SemVAE in {semvae} has {targets.semvae.config.latent_channels} latent channels, {shards.folder} "
                f"{shards.semantic_channels} semantic ones: set data.semvae to the one that the cache was encoded with"
            )
        return targets
    if not settings:
        raise ValueError(f"{shards.folder} has no manifest: online targets need a cache made by `sfd encode`")
    if not vfm:
        raise ValueError("online targets need the VFM that the cache was encoded with: set data.vfm")
    index = _index(shards.folder, images)
    _check_same(settings, "images", index.fingerprint(), shards.folder)
    encoder = load_vfm(vfm, grid_size=int(shards.grid[0]), setting="--data.vfm")
    targets = OnlineTargets(encoder, index, settings, num_threads)
    _check_same(settings, "vfm", targets.fingerprint, shards.folder)
    return targets


def _index(folder: Path, images: str | Path) -> ImageIndex:
    """The index of a cache's images, at their new place if one is given; the first image is read."""
    path = Path(folder, INDEX_FOLDER, INDEX_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: online targets need it, copy it from where the cache was made")
    index = ImageIndex.load(path)
    index = index.at(images) if images else index
    try:
        index.read(0)
    except OSError as error:
        raise ValueError(
            f"online targets read the images that {folder} was encoded from: {error}; where they moved, set data.images"
        ) from error
    return index


def _check_same(settings: dict, name: str, fingerprint: str, folder: Path) -> None:
    made_with = settings.get(name)  # None: it had no part in the cache
    if made_with and made_with != fingerprint:
        raise ValueError(
            f"{folder} was encoded with another {name} ({made_with[:12]}... there, {fingerprint[:12]}... given): "
            f"targets of one cache must come from the parts that made it; set data.{name}"
        )


def with_targets(
    loader: LatentLoader,
    targets: Targets | None,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[Batch]:
    """The loader's batches with "features" (B, N, F) from `targets`; unchanged where targets is None.

    precision: autocast of the targets' networks.
    """
    with closing(iter(loader)) as batches:
        if targets is None:
            yield from batches
            return
        for batch in batches:
            positions = loader.positions(loader.step - 1)
            numbers = loader.shards.numbers(loader.indices(positions))
            with precision():
                features = targets(batch["latents"], numbers, loader.flips(positions))
            targets.expect(loader.shards.numbers(loader.indices(loader.positions(loader.step))))
            yield batch | {"features": features}
