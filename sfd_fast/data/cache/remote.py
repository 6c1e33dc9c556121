"""Shards on remote storage: fsspec addresses are copied once into a local folder, then read like local files."""

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from sfd_fast.config import require
from sfd_fast.data.cache.manifest import MANIFEST, STATISTICS_SUFFIX, check_complete, check_shards, read_manifest
from sfd_fast.data.cache.shards import Header, allow_open_files, read_header, write_json
from sfd_fast.data.images.index import INDEX_FOLDER
from sfd_fast.files.atomic import write_atomically
from sfd_fast.files.digest import file_digest
from sfd_fast.files.documents import read_json
from sfd_fast.files.home import with_home

if TYPE_CHECKING:
    import fsspec

HASHES = ("ETag", "etag", "md5", "md5Hash", "content_md5", "crc32c", "checksum", "sha256", "blob_id", "xet_hash")
TIMES = ("generation", "LastModified", "last_modified", "last_commit", "mtime", "updated", "created")
"""what file systems of fsspec tell of a file's content: hashes tell it, and only where there are none, times do"""


@with_home
def is_remote(path: str | Path) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")


@with_home
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


@with_home
def fetch_folder(address: str, cache_folder: str | Path) -> Path:
    """Copies what a remote cache has and the local copy has not, or has otherwise: shards, statistics, manifest, index.

    One process of a node fetches, the others wait for it. Each file arrives under a temporary name and is renamed, and
    what tells its content is noted: the storage's own hash or time, and the checksum of a shard that the manifest
    lists. Where one of them is the same later, the copy is taken as present; a storage that tells nothing but sizes
    is asked for every file again, except for shards that the manifest tells. Files that are gone there go here too.
    Returns the local folder. Raises ValueError where the folder has no shards, or a shard arrives damaged;
    FileNotFoundError where there is no such folder.
    """
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(address)
    local = Path(cache_folder, sha256(address.encode()).hexdigest()[:16])
    local.mkdir(parents=True, exist_ok=True)
    with alone(local.with_suffix(".lock")):
        rows = wanted_rows(filesystem, root)
        require(any(name.endswith(".safetensors") for name, _ in rows), f"no *.safetensors shards in {address}")
        notes = local.with_suffix(".json")
        known = read_notes(notes)
        for name in known.keys() - {name for name, _ in rows}:
            (local / name).unlink(missing_ok=True)
        for name, row in rows:
            listed = (read_manifest(local) or {}).get("shards", {}).get(name, {}).get("sha256")
            if not is_present(local / name, row, known.get(name, {}), listed):
                fetch(filesystem, row["name"], local / name, listed)
                known[name] = told(row) | ({"listed": listed} if listed else {})
                write_json(notes, known)
    return local


def wanted_rows(filesystem: "fsspec.AbstractFileSystem", root: str) -> list[tuple[str, dict]]:
    """(name in the local folder, what the storage tells of it) of each file that training needs.

    The manifest is first: it tells what the shards must be.
    """
    found = {Path(row["name"]).name: row for row in filesystem.ls(root, detail=True) if is_wanted(row["name"])}
    index = f"{root.rstrip('/')}/{INDEX_FOLDER}"
    if filesystem.isdir(index):
        rows = [row for row in filesystem.ls(index, detail=True) if row["type"] == "file"]
        found |= {f"{INDEX_FOLDER}/{Path(row['name']).name}": row for row in rows}
    for name, row in found.items():
        if not told(row) or row.get("size") is None:  # listings over http hold names alone
            found[name] = row | filesystem.info(row["name"])
    return sorted(found.items(), key=lambda item: (item[0] != MANIFEST, item[0]))


def told(row: dict) -> dict[str, str]:
    """What the storage tells of a file's content: its hashes, or else its times; nothing where it tells sizes alone."""
    for keys in (HASHES, TIMES):
        found = {key: str(row[key]) for key in keys if row.get(key)}
        if found:
            return found
    return {}


def is_present(path: Path, row: dict, note: dict, listed: str | None) -> bool:
    """Whether the local copy is that file still. listed: its checksum in the manifest, as it is there now."""
    if not path.is_file() or path.stat().st_size != row["size"] or (listed and note.get("listed") != listed):
        return False
    return bool(listed) or (bool(told(row)) and {key: note.get(key) for key in told(row)} == told(row))


def fetch(filesystem: "fsspec.AbstractFileSystem", name: str, target: Path, listed: str | None) -> None:
    """Raises ValueError where a shard of the manifest arrives with another checksum."""
    target.parent.mkdir(exist_ok=True)
    write_atomically(target, lambda temporary: filesystem.get_file(name, str(temporary)))
    if listed and file_digest(target) != listed:
        target.unlink()
        raise ValueError(f"{name} is not what its manifest lists: it was damaged there or on its way")


def read_notes(path: Path) -> dict[str, dict]:
    """What was noted of each local copy; nothing where the notes are missing or damaged: files are fetched again."""
    try:
        return {name: note for name, note in read_json(path).items() if isinstance(note, dict)}
    except (FileNotFoundError, ValueError):
        return {}


def is_wanted(name: str) -> bool:
    """Whether a file of a cache's folder is needed to train on it."""
    return name.endswith((".safetensors", STATISTICS_SUFFIX)) or Path(name).name == MANIFEST


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process of this node is inside with the same file; one that dies lets the next one in."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
