"""REPA targets y* that are not stored: decoded from the semantic latent, or computed by the VFM beside training.

stored: 393 KB an image and flip in the cache (released layout). semvae: nothing beyond the semantic latent that is
there anyway (8 KB), and one SemVAE decoder pass a step. online: nothing, and one VFM pass with decoding a step.
Letters: B batch, N tokens, F feature width, C channels, H, W.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from sfd_fast.data.encoders import to_tokens
from sfd_fast.data.images import load
from sfd_fast.data.index import INDEX_FILE, ImageIndex
from sfd_fast.data.latents import Batch, LatentLoader, LatentShards
from sfd_fast.data.manifest import read_manifest, weights_fingerprint
from sfd_fast.data.prepare import INDEX_FOLDER
from sfd_fast.data.statistics import LatentStatistics
from sfd_fast.models.vfm import VFM
from sfd_fast.transport import split_latents


class Targets(Protocol):
    """Features of given samples: the target of the REPA head."""

    shape: tuple[int, int]
    """(N, F)"""

    def __call__(self, latents: Tensor, numbers: Tensor, flip: Tensor) -> Tensor:
        """latents: (B, C, H, W) normalised composite; numbers: (B,) int64 of the samples in the whole cache; flip: (B,)
        bool, both on the CPU.  Returns (B, N, F) on the latents' device, without gradient."""

    def expect(self, numbers: Tensor) -> None:
        """The samples that will be asked for next, for what can be fetched ahead."""


class SemVAETargets:
    """y* = SemVAE decoder(semantic latent): what REPA learns from is what SemVAE kept of the features."""

    def __init__(self, semvae: nn.Module, statistics: LatentStatistics, num_tokens: int):
        self.semvae, self.statistics = semvae.eval().requires_grad_(False), statistics
        self.shape = (num_tokens, semvae.config.feature_channels)

    @torch.no_grad()
    def __call__(self, latents: Tensor, numbers: Tensor, flip: Tensor) -> Tensor:
        _, semantic = split_latents(latents, self.statistics.texture_channels)
        return self.semvae.decode(to_tokens(self.statistics.denormalize_semantic(semantic.float())))

    def expect(self, numbers: Tensor) -> None:
        pass


class OnlineTargets:
    """y* = VFM(image): exact, for caches without features; images are decoded by threads while the step before runs."""

    def __init__(self, vfm: VFM, index: ImageIndex, image_size: int, crop: str, num_threads: int = 2):
        self.vfm, self.index, self.image_size, self.crop = vfm, index, image_size, crop
        self.shape = (vfm.grid_size**2, vfm.width)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="online")
        self._expected: dict[int, Future] = {}

    def _decoded(self, number: int) -> Tensor:
        return load(self.index.read(number), self.image_size, self.crop)

    def expect(self, numbers: Tensor) -> None:
        """At most one batch is held."""
        self._expected = {int(i): self._pool.submit(self._decoded, int(i)) for i in numbers}

    def __call__(self, latents: Tensor, numbers: Tensor, flip: Tensor) -> Tensor:
        expected, self._expected = self._expected, {}
        images = [
            expected[int(i)] if int(i) in expected else self._pool.submit(self._decoded, int(i)) for i in numbers
        ]
        pixels = torch.stack([future.result() for future in images])
        pixels = torch.where(flip[:, None, None, None], pixels.flip(2), pixels)
        return self.vfm.features(pixels.to(latents.device))


def open_targets(
    kind: Literal["stored", "semvae", "online"],
    shards: LatentShards,
    statistics: LatentStatistics,
    *,
    semvae: str | Path = "",
    vfm: str | Path = "",
    images: str | Path = "",
    device: torch.device | str = "cpu",
) -> SemVAETargets | OnlineTargets | None:
    """The targets of a cache; None for stored ones, which the loader reads.

    semvae, vfm: as they were given to `sfd encode`; images: needed for online targets only where they moved.
    Raises ValueError where the cache was made with another SemVAE, VFM or other images.
    """
    if kind == "stored":
        if shards.feature_shape is None:
            raise ValueError(
                f"{shards.folder} has no VFM features (feats_dino): use semvae or online targets, or encode them with "
                "features=True"
            )
        return None
    settings = (read_manifest(shards.folder) or {}).get("settings", {})
    if kind == "semvae":
        from sfd_fast.checkpoint import load_semvae

        if not semvae:
            raise ValueError("semvae targets need the SemVAE that the cache was encoded with: give its path")
        model = load_semvae(semvae)
        _check_same(settings, "semvae", weights_fingerprint(model), shards.folder)
        return SemVAETargets(model.to(device), statistics.to(device), int(shards.grid[0] * shards.grid[1]))
    if not settings:
        raise ValueError(f"{shards.folder} has no manifest: online targets need a cache made by `sfd encode`")
    from sfd_fast.models.vfm import load_vfm

    if not vfm:
        raise ValueError("online targets need the VFM that the cache was encoded with: give its path or id")
    encoder = load_vfm(vfm, grid_size=int(shards.grid[0]))
    _check_same(settings, "vfm", weights_fingerprint(encoder), shards.folder)
    index = ImageIndex.load(Path(shards.folder, INDEX_FOLDER, INDEX_FILE))
    _check_same(settings, "images", index.fingerprint(), shards.folder)
    index = index.at(images) if images else index
    return OnlineTargets(encoder.to(device), index, settings["image_size"], settings["crop"])


def _check_same(settings: dict, name: str, fingerprint: str, folder: Path) -> None:
    if settings and settings[name] != fingerprint:
        raise ValueError(
            f"{folder} was encoded with another {name} ({settings[name][:12]}... there, {fingerprint[:12]}... given): "
            "targets of one cache must come from the parts that made it"
        )


def with_targets(loader: LatentLoader, targets: Targets | None) -> Iterator[Batch]:
    """The loader's batches with "features" (B, N, F) from `targets`; unchanged where targets is None."""
    if targets is None:
        yield from loader
        return
    for batch in loader:
        positions = loader.positions(loader.step - 1)
        numbers = loader.shards.numbers(loader.indices(positions))
        features = targets(batch["latents"], numbers, loader.flips(positions))
        targets.expect(loader.shards.numbers(loader.indices(loader.positions(loader.step))))
        yield batch | {"features": features}
