"""Shards on remote storage: fsspec addresses are copied once into a local folder, then read like local files."""

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from sfd_fast.data.cache.manifest import MANIFEST, check_complete, check_shards, read_manifest
from sfd_fast.data.cache.shards import Header, allow_open_files, read_header, write_json
from sfd_fast.data.images.index import INDEX_FOLDER
from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.digest import file_digest

STATISTICS_SUFFIX = "_stats.pt"
IDENTITY = (
    "size", "ETag", "etag", "md5", "md5Hash", "crc32c", "checksum", "sha256", "generation", "LastModified",
    "last_modified", "mtime", "updated", "created",
)  # fmt: skip
"""what file systems of fsspec tell of a file's content"""


def is_remote(path: str | Path) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")


def open_shards(
    paths: str | Path | Iterable[str | Path], cache_folder: str | Path | None = None
) -> tuple[Path, list[str], list[Header]]:
    """The folder with the statistics, the local shard files and their headers; remote ones are fetched first.

    Raises ValueError where there are no shards, a shard is damaged or is not what the folder's manifest lists, or a
    remote address is given without cache_folder; FileNotFoundError where a shard of the manifest is missing.
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
    found, headers = [], []
    for path in given:
        if not path.exists():
            raise FileNotFoundError(
                f"{path.absolute()} does not exist; a cache is a folder of *.safetensors shards, a released one or one "
                "made by `sfd features` or `sfd encode`"
            )
        names = sorted(str(shard) for shard in path.glob("[!.]*.safetensors")) if path.is_dir() else [str(path)]
        manifest = check_complete(path, [Path(name).name for name in names]) if path.is_dir() else None
        found += names
        headers += map(read_header, names)
        check_shards(path, manifest, names, headers[len(headers) - len(names) :])
    if not found:
        raise ValueError(
            f"no *.safetensors shards in {', '.join(map(str, given))}; make them with `sfd encode`, or give the folder "
            "of a released cache"
        )
    allow_open_files(len(found))
    return (given[0] if given[0].is_dir() else given[0].parent), found, headers


def fetch_folder(address: str, cache_folder: str | Path) -> Path:
    """Copies shards, statistics, manifest and image index of a remote folder that are not in the local copy yet.

    One process of a node fetches, the others wait for it. Each file arrives under a temporary name and is renamed, and
    what the storage says of it (size, hash, time) is noted: where that is the same later, the copy is taken as present.
    Shards are compared with the checksums of the manifest as they arrive. Returns the local folder.
    Raises ValueError where the folder has no shards, or a shard arrives damaged; FileNotFoundError where there is no
    such folder.
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
        notes = local.with_suffix(".json")
        known = json.loads(notes.read_text()) if notes.is_file() else {}
        # the manifest first: it tells what the shards must be
        for folder, row in sorted(rows, key=lambda pair: (Path(pair[1]["name"]).name != MANIFEST, pair[1]["name"])):
            target = folder / Path(row["name"]).name
            name, note = str(target.relative_to(local)), {key: str(row[key]) for key in IDENTITY if key in row}
            if target.is_file() and target.stat().st_size == row["size"] and known.get(name) == note:
                continue
            folder.mkdir(exist_ok=True)
            write_atomically(target, lambda temporary, name=row["name"]: filesystem.get_file(name, str(temporary)))
            listed = (read_manifest(local) or {}).get("shards", {}).get(name)
            if listed is not None and file_digest(target) != listed["sha256"]:
                target.unlink()
                raise ValueError(f"{row['name']} is not what its manifest lists: it was damaged there or on its way")
            known[name] = note
            write_json(notes, known)
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
