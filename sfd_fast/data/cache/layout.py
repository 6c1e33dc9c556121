"""The tensors of a latent shard, and the check that all shards of a cache are of one kind (docs/METHOD.md 6)."""

from sfd_fast.data.cache.shards import Entry, Header

LABELS = "labels"
TEXTURE = ("latents", "latents_dino")
"""in the order of their channels; PCA features of older caches count as texture"""
TEXTURE_MEAN = "latents_mean"
TEXTURE_LOGVAR = "latents_logvar"
"""in place of `latents` where the cache holds the posterior's moments"""
SEMANTIC = ("latents_sv",)
FEATURES = "feats_dino"
FLIP = "_flip"


def texture_keys(entries: dict[str, Entry]) -> list[str]:
    """Names of the texture tensors, in the order of their channels."""
    first = TEXTURE_MEAN if TEXTURE_MEAN in entries else TEXTURE[0]
    return [key for key in (first, *TEXTURE[1:]) if key in entries]


def semantic_keys(entries: dict[str, Entry]) -> list[str]:
    return [key for key in SEMANTIC if key in entries]


def check_alike(paths: list[str], headers: list[Header]) -> None:
    """Raises ValueError naming the file that does not belong to the same cache as the first one."""
    first = headers[0]
    for names in ((LABELS,), (TEXTURE[0], TEXTURE_MEAN)):
        if not any(name in first.entries for name in names):
            raise ValueError(
                f"{paths[0]} has no tensor '{names[0]}'; it holds {', '.join(first.entries) or 'nothing'}. A latent "
                "shard needs at least labels and latents"
            )
    streams = [first.entries[key] for key in texture_keys(first.entries) + semantic_keys(first.entries)]
    if any(entry.dtype != streams[0].dtype or entry.shape[2:] != streams[0].shape[2:] for entry in streams):
        raise ValueError(
            f"{paths[0]}: texture and semantic latents must share dtype and grid, got "
            f"{[(entry.dtype, entry.shape) for entry in streams]}"
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


def check_settings(path: str, header: Header, first_path: str, first: Header) -> None:
    """Raises ValueError where two shards were encoded with different settings."""
    if header.metadata.get("fingerprint") != first.metadata.get("fingerprint"):
        raise ValueError(
            f"{path} was encoded with other settings than {first_path} (their fingerprints differ): two caches are "
            "mixed in one folder; keep each in its own"
        )
