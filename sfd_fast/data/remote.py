"""Shards on remote storage: fsspec addresses are copied once into a local folder, then read like local files."""

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from sfd_fast.data.manifest import MANIFEST, check_complete
from sfd_fast.data.shards import shard_paths

STATISTICS_SUFFIX = "_stats.pt"


def is_remote(path: str | Path) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")


def local_shards(
    paths: str | Path | Iterable[str | Path], cache_folder: str | Path | None = None
) -> tuple[Path, list[str]]:
    """The folder with the statistics, and the local shard files; remote ones are fetched first.

    Raises ValueError where there are no shards, or a remote address is given without cache_folder; FileNotFoundError
    where a shard that the folder's manifest names is missing.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if any(map(is_remote, given)):
        if cache_folder is None:
            raise ValueError(f"{given[0]} is remote: name a local folder for its copy (cache_folder)")
        given = [fetch_folder(str(path), cache_folder) if is_remote(path) else path for path in given]
    given = [Path(str(path).removeprefix("file://")) for path in given]
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; latent shards are a folder or *.safetensors files")
        if path.is_dir():
            check_complete(path, [Path(name).name for name in path.glob("*.safetensors")])
    found = shard_paths(given)
    return (given[0] if given[0].is_dir() else given[0].parent), found


def fetch_folder(address: str, cache_folder: str | Path) -> Path:
    """Copies shards, statistics and manifest of a remote folder that are not in the local copy yet.

    Each file arrives under a temporary name and is renamed, so several ranks may fetch at once. A file of the same
    size is taken as present. Returns the local folder. Raises ValueError where the folder has no shards.
    """
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(address)
    local = Path(cache_folder, sha256(address.encode()).hexdigest()[:16])
    local.mkdir(parents=True, exist_ok=True)
    wanted = [
        row
        for row in filesystem.ls(root, detail=True)
        if row["name"].endswith((".safetensors", STATISTICS_SUFFIX)) or Path(row["name"]).name == MANIFEST
    ]
    if not any(row["name"].endswith(".safetensors") for row in wanted):
        raise ValueError(f"no *.safetensors shards in {address}")
    for row in sorted(wanted, key=lambda row: row["name"]):
        target = local / Path(row["name"]).name
        if target.is_file() and target.stat().st_size == row["size"]:
            continue
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        filesystem.get_file(row["name"], str(temporary))
        os.replace(temporary, target)
    return local
