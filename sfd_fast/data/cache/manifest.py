"""The manifest of a cache: what it was made from and of, so that a mixed-up or unfinished cache is refused."""

import json
from pathlib import Path

from sfd_fast.data.cache.shards import write_json
from sfd_fast.files.digest import settings_digest

MANIFEST = "manifest.json"
FORMAT = 1


def read_manifest(folder: str | Path) -> dict | None:
    """The manifest of a folder, None where it has none.

    Raises ValueError naming a manifest that is not JSON, or of another format.
    """
    path = Path(folder, MANIFEST)
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): copy it again, or delete it and run the command "
            "that made the cache again, which then encodes every shard again"
        ) from None
    if found != FORMAT:
        raise ValueError(
            f"{path} is of format {found}, this version reads {FORMAT}: use the version of sfd_fast that made the "
            "cache, or encode it again into another folder"
        )
    return manifest


def begin(folder: str | Path, settings: dict, sources: dict[str, str] | None = None) -> dict:
    """Claims a folder for these settings and returns its manifest: a new one, or that of the run to continue.

    sources: where images and encoders were read, for people and `sfd inspect`; they may move, so they are not compared.
    Raises ValueError naming what differs where the folder belongs to a run with other settings.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        manifest = {
            "format": FORMAT,
            "complete": False,
            "settings": settings,
            "sources": sources or {},
            "fingerprint": settings_digest(settings),
        }
        write_json(Path(folder, MANIFEST), manifest)
        return manifest
    if manifest["settings"] != settings:
        old = manifest["settings"]
        keys = sorted(k for k in old.keys() | settings.keys() if old.get(k) != settings.get(k))
        raise ValueError(
            f"{folder} holds a cache of other settings: "
            + "; ".join(f"{k} is {old.get(k)!r} there, {settings.get(k)!r} now" for k in keys)
            + ". Use the same settings to continue it, or another output folder"
        )
    return manifest


def check_complete(folder: str | Path, names: list[str]) -> dict | None:
    """The manifest of a folder whose shards are `names`, None for a folder without one (a released cache).

    Raises ValueError where it is unfinished, where a shard has another size than listed or is not listed at all;
    FileNotFoundError where a listed shard is missing.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if not manifest.get("complete", False):
        raise ValueError(f"{folder} is an unfinished cache: run the same command again, it continues where it stopped")
    for name, row in manifest["shards"].items():
        path = Path(folder, name)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, but {Path(folder, MANIFEST)} lists it: copy it again, or run the command that "
                "made the cache again: it encodes only what is missing or damaged"
            )
        if path.stat().st_size != row["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {row['bytes']}: it is damaged; copy it "
                "again, or run the command that made the cache again: it encodes only what is missing or damaged"
            )
    foreign = sorted(set(names) - set(manifest["shards"]))
    if foreign:
        raise ValueError(
            f"{Path(folder, foreign[0])} is not listed in {Path(folder, MANIFEST)}: it belongs to another cache; two "
            "caches must not share a folder"
        )
    return manifest
