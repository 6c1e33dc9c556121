"""Shards on remote storage: fsspec addresses are copied once into a local folder, then read like local files."""

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from sfd_fast.data.cache.manifest import MANIFEST, check_complete
from sfd_fast.data.cache.shards import shard_paths
from sfd_fast.data.images.index import INDEX_FOLDER
from sfd_fast.files.atomic import write_atomically

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
        if not cache_folder:
            raise ValueError(
                f"{next(filter(is_remote, given))} is remote: name a local folder for its copy (data.cache_folder; "
                "cache_folder of `sfd inspect`)"
            )
        given = [fetch_folder(str(path), cache_folder) if is_remote(path) else path for path in given]
    given = [Path(str(path).removeprefix("file://")) for path in given]
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give a folder of shards or *.safetensors files")
        if path.is_dir():
            check_complete(path, [Path(name).name for name in path.glob("*.safetensors")])
    found = shard_paths(given)
    return (given[0] if given[0].is_dir() else given[0].parent), found


def fetch_folder(address: str, cache_folder: str | Path) -> Path:
    """Copies shards, statistics, manifest and image index of a remote folder that are not in the local copy yet.

    One process of a node fetches, the others wait for it. Each file arrives under a temporary name and is renamed: one
    of the same size is taken as present. Returns the local folder. Raises ValueError where the folder has no shards,
    FileNotFoundError where there is no such folder.
    """
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(address)
    local = Path(cache_folder, sha256(address.encode()).hexdigest()[:16])
    local.mkdir(parents=True, exist_ok=True)
    with alone(local.with_suffix(".lock")):
        wanted = [row for row in filesystem.ls(root, detail=True) if is_wanted(row["name"])]
        if not any(row["name"].endswith(".safetensors") for row in wanted):
            raise ValueError(f"no *.safetensors shards in {address}")
        index = f"{root.rstrip('/')}/{INDEX_FOLDER}"
        rows = [(local, row) for row in wanted]
        if filesystem.isdir(index):
            rows += [(local / INDEX_FOLDER, row) for row in filesystem.ls(index, detail=True) if row["type"] == "file"]
        for folder, row in sorted(rows, key=lambda pair: pair[1]["name"]):
            target = folder / Path(row["name"]).name
            if target.is_file() and target.stat().st_size == row["size"]:
                continue
            folder.mkdir(exist_ok=True)
            write_atomically(target, lambda temporary, name=row["name"]: filesystem.get_file(name, str(temporary)))
    return local


def is_wanted(name: str) -> bool:
    """Whether a file of a cache's folder is needed to train on it."""
    return name.endswith((".safetensors", STATISTICS_SUFFIX)) or Path(name).name == MANIFEST


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process of this node is inside with the same file; one that dies lets the next one in."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
