"""The tensors of a latent shard (docs/METHOD.md 6): names, statistics, and whether all shards are of one cache."""

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from sfd_fast.data.cache.shards import Header
from sfd_fast.diffusion.statistics import ChannelMoments

LABELS = "labels"
TEXTURE = "latents"
TEXTURE_MEAN, TEXTURE_LOGVAR = "latents_mean", "latents_logvar"
"""in place of `latents` where the cache holds the posterior's moments"""
PCA = "latents_dino"
"""principal components of VFM features, in older caches: semantic latents that are never normalised"""
SEMANTIC = "latents_sv"
FEATURES = "feats_dino"
RELEASED_FEATURES, RELEASED_LABELS = "patch_tokens", "class_idx"
"""(N, tokens, F) and (N,): in the authors' own files for SemVAE, features_NUMBERsamples.safetensors, without flips"""
FLIP = "_flip"
DIMENSIONS = {LABELS: 1, TEXTURE: 4, TEXTURE_MEAN: 4, TEXTURE_LOGVAR: 4, PCA: 4, SEMANTIC: 4, FEATURES: 4}
"""of the tensors of a latent shard, samples first"""
MAX_CLASSES = 100_000
"""labels at or above it are taken for a mistake; ImageNet-21k has 21,841 classes"""


def composite_keys(names: Iterable[str]) -> list[str]:
    """Names of the tensors that make the composite latent, in the order of their channels; the first is texture."""
    names = set(names)
    first = TEXTURE_MEAN if TEXTURE_MEAN in names else TEXTURE
    return [key for key in (first, PCA, SEMANTIC) if key in names]


def feature_key(names: Iterable[str]) -> str:
    """The name of a shard's features."""
    names = set(names)
    return RELEASED_FEATURES if RELEASED_FEATURES in names and FEATURES not in names else FEATURES


def label_key(names: Iterable[str]) -> str:
    """The name of a shard's labels."""
    names = set(names)
    return RELEASED_LABELS if RELEASED_LABELS in names and LABELS not in names else LABELS


def feature_sizes(shape: Sequence[int]) -> tuple[int, int]:
    """(F, side of their square grid) of features of one sample, (F, h, w) or (tokens, F); 0 where that is no square."""
    if len(shape) == 3:
        return shape[0], shape[1] if shape[1] == shape[2] else 0
    side = math.isqrt(shape[0])
    return shape[1], side if side**2 == shape[0] else 0


def moments(tensors: Mapping[str, Tensor]) -> tuple[ChannelMoments, ChannelMoments]:
    """Moments of the unflipped (texture, semantic) latents of a shard, without PCA; empty where there are none.

    Raises ValueError naming the tensor and the sample where a value is not finite.
    """
    found = []
    for names in ((TEXTURE, TEXTURE_MEAN), (SEMANTIC,)):
        part = ChannelMoments.empty(0)
        for name in names:
            if name in tensors:
                try:
                    part = ChannelMoments.of(tensors[name])
                except ValueError as error:
                    raise ValueError(f"'{name}': {error}") from None
        found.append(part)
    if TEXTURE_LOGVAR in tensors:
        found[0] = found[0].with_noise(tensors[TEXTURE_LOGVAR])
    return found[0], found[1]


def check_alike(paths: list[str], headers: list[Header]) -> None:
    """Raises ValueError naming the file that does not belong to the same cache as the first one."""
    first = headers[0]
    for names in ((LABELS,), (TEXTURE, TEXTURE_MEAN)):
        if not any(name in first.entries for name in names):
            raise ValueError(
                f"{paths[0]} has no tensor '{names[0]}'; it holds {', '.join(first.entries) or 'nothing'}. A latent "
                "shard needs at least labels and latents"
            )
    for name, entry in first.entries.items():
        wanted = DIMENSIONS.get(name.removesuffix(FLIP))
        if wanted and (len(entry.shape) != wanted or entry.dtype.is_floating_point == (name == LABELS)):
            raise ValueError(
                f"{paths[0]}: '{name}' is {entry.dtype} of shape {entry.shape}; it must have {wanted} dimension(s), "
                f"{'whole numbers' if name == LABELS else 'floating point'}"
            )
    parts = [first.entries[key] for key in composite_keys(first.entries)]
    if any(entry.dtype != parts[0].dtype or entry.shape[2:] != parts[0].shape[2:] for entry in parts):
        raise ValueError(
            f"{paths[0]}: texture and semantic latents must share dtype and grid, got "
            f"{[(entry.dtype, entry.shape) for entry in parts]}"
        )
    for path, header in zip(paths, headers):
        if header.entries.keys() != first.entries.keys():
            different = sorted(header.entries.keys() ^ first.entries.keys())
            raise ValueError(f"{path} does not belong to the cache of {paths[0]}: they differ in tensors {different}")
        count = header.entries[LABELS].shape[0]
        for name, entry in header.entries.items():
            reference = first.entries[name]
            if (entry.dtype, entry.shape[1:]) != (reference.dtype, reference.shape[1:]):
                raise ValueError(
                    f"{path} does not belong to the cache of {paths[0]}: '{name}' is {entry.dtype} {entry.shape[1:]} "
                    f"per sample, there {reference.dtype} {reference.shape[1:]}"
                )
            if entry.shape[0] != count:
                raise ValueError(f"{path}: '{name}' has {entry.shape[0]} samples but there are {count} labels")
        check_settings(path, header, paths[0], first)


def largest_label(path: str, labels: Tensor) -> int:
    """Of one shard; -1 where it has none. Raises ValueError naming a label that is no class number."""
    if not len(labels):
        return -1
    low, high = (int(end) for end in labels.aminmax())
    for label in (low, high):
        if not 0 <= label < MAX_CLASSES:
            raise ValueError(f"{path} has label {label}: labels are whole numbers from 0 to {MAX_CLASSES - 1}")
    return high


def check_settings(path: str, header: Header, first_path: str, first: Header) -> None:
    """Raises ValueError where two shards were encoded with different settings."""
    if header.metadata.get("fingerprint") != first.metadata.get("fingerprint"):
        raise ValueError(
            f"{path} was encoded with other settings than {first_path} (their fingerprints differ): two caches are "
            "mixed in one folder; keep each in its own"
        )
