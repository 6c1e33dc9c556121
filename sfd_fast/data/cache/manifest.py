"""The manifest of a cache: what it was made from and of, so that a mixed-up or unfinished cache is refused."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfd_fast.config import require
from sfd_fast.config.checks import Count, Natural, checked
from sfd_fast.data.cache.shards import Header, read_header, write_json
from sfd_fast.diffusion.statistics import PARTS
from sfd_fast.files.digest import settings_digest
from sfd_fast.files.documents import read_json
from sfd_fast.files.home import with_home

MANIFEST = "manifest.json"
STATISTICS_SUFFIX = "_stats.pt"
FORMAT = 1
OF_IMAGES = ("images", "num_images")
"""settings that an update changes; a shard's fingerprint leaves them out"""
TOP = {
    "complete": bool, "fingerprint": str, "count": Natural, "classes": tuple[str, ...],
    "class_counts": tuple[Natural, ...], "bytes_per_image": float, "semvae_target_cosine": float,
    "dali_failures": Natural,
}  # fmt: skip
SETTINGS = {
    "images": str, "num_images": Natural, "shard_size": Count, "image_size": Count, "crop": str, "background": str,
    "vfm": str | None, "vfm_width": Count | None, "vfm_grid": Count, "semvae": str | None, "texture_codec": str,
}  # fmt: skip
"""those of them that something reads"""
ROW = {"bytes": Natural, "count": Natural, "sha256": str, "images": str, "cosine": float, "dali_failures": Natural}
"""of a shard"""
PART = {"count": Natural, "mean": tuple[float, ...], "std": tuple[float, ...]}
"""of the statistics"""


def shard_name(k: int) -> str:
    """File name of the k-th shard of a cache of ours."""
    return f"shard-{k:05d}.safetensors"


@with_home
def read_manifest(folder: str | Path) -> dict | None:
    """The manifest of a folder, None where it has none.

    Raises ValueError naming a manifest that is damaged, or of another format.
    """
    path = Path(folder, MANIFEST)
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
        found = manifest.get("format")
        if found == FORMAT:
            check_shape(manifest)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): copy it again, or delete it and run the command that made the cache again, "
            "which then encodes every shard again"
        ) from None
    if found != FORMAT:
        raise ValueError(
            f"{path} is of format {found!r:.20}, this version reads {FORMAT}: use the version of sfd_fast that made "
            "the cache, or encode it again into another folder"
        )
    return manifest


def check_shape(manifest: dict) -> None:
    """Raises ValueError where the manifest does not hold what every one holds."""
    check_kinds("", manifest, TOP)
    for name in ("settings", "sources", "statistics", "shards", "previous"):
        require(isinstance(manifest.get(name, {}), dict), f"'{name}' is no group")
    check_kinds("settings", manifest.get("settings", {}), SETTINGS)
    for name, source in manifest.get("sources", {}).items():
        checked(source, str, f"sources.{name}")
    statistics = manifest.get("statistics", {})
    require(not statistics or statistics.keys() == set(PARTS), f"'statistics' must be of {' and '.join(PARTS)}")
    for name, part in statistics.items():
        check_kinds(f"statistics.{name}", part, PART, needed=("mean", "std"))
        require(len(part["mean"]) == len(part["std"]), f"statistics.{name} has not as many means as deviations")
    for group in ("shards", "previous"):
        for name, row in manifest.get(group, {}).items():
            require(Path(name).name == name, f"'{name}' is no file's name")
            check_kinds(f"{group}.{name}", row, ROW, needed=("bytes", "sha256"))
    require("complete" in manifest, "'complete' is missing")
    if manifest["complete"]:
        require("shards" in manifest, "'shards' is missing")
        settings = manifest.get("settings", {})
        if {"num_images", "shard_size"} <= settings.keys():
            count = -(-settings["num_images"] // settings["shard_size"])
            listed = len(manifest["shards"]) == count and all(shard_name(k) in manifest["shards"] for k in range(count))
            require(listed, f"'shards' does not list the {count} shards of {settings['num_images']} images")


def check_kinds(where: str, group: Any, kinds: dict[str, Any], needed: Sequence[str] = ()) -> None:
    """Raises ValueError where a group is none, lacks a needed value, or has one of another kind."""
    require(isinstance(group, dict), f"'{where}' is no group")
    for name in needed:
        require(name in group, f"'{where}.{name}' is missing")
    for name, kind in kinds.items():
        if name in group:
            checked(group[name], kind, f"{where}.{name}".lstrip("."))


def own_shards(folder: Path) -> dict[str, dict]:
    """Shards of ours in a folder that has no manifest, as rows of one: they give way to new ones.

    Raises ValueError for files under our names that this system did not write.
    """
    found = {}
    for path in (*sorted(folder.glob("[!.]*.safetensors")), *sorted(folder.glob(f"[!.]*{STATISTICS_SUFFIX}"))):
        ours = False
        if path.name.startswith("shard-") and path.suffix == ".safetensors":
            with contextlib.suppress(ValueError):
                ours = "fingerprint" in read_header(path).metadata
            found[path.name] = {"bytes": path.stat().st_size, "sha256": ""}
        require(
            ours or (found and path.suffix == ".pt"),
            f"{path} was not written by this command, so its folder is left alone: choose another output folder, or "
            "move the file away",
        )
    return found


def check_place(folder: Path, images: str) -> None:
    """Raises ValueError where a cache may not be made: in place of files of others, or among the images themselves."""
    source = Path(images).expanduser()
    require(
        not (source.is_dir() and folder.resolve().is_relative_to(source.resolve())),
        f"out {folder} lies among the images of {images}: its files would be taken for images next time; choose "
        "another folder",
    )
    if read_manifest(folder) is None:
        own_shards(folder)


@with_home
def begin(folder: str | Path, settings: dict, sources: dict[str, str], *, update: bool = False) -> dict:
    """Claims a folder for these settings and returns its manifest: a new one, or that of the run to continue.

    sources: where images and encoders were read, for people and `sfd inspect`; they may move, so they are not compared.
    update: other images are allowed; the manifest is then one of an unfinished cache that lists the shards before.
    Raises ValueError naming what differs where the folder belongs to a run with other settings.
    """
    manifest = read_manifest(folder)
    old = {} if manifest is None else manifest.get("settings", {})
    keys = sorted(key for key in old.keys() | settings.keys() if old.get(key) != settings.get(key))
    if manifest is not None and not keys:
        return manifest
    if manifest is not None and not (update and set(keys) <= set(OF_IMAGES)):
        raise ValueError(
            f"{folder} holds a cache of other settings: "
            + "; ".join(f"{key} is {old.get(key)!r} there, {settings.get(key)!r} now" for key in keys)
            + ". Use the same settings to continue it (--update for other images), or another output folder"
        )
    before = manifest or {}
    manifest = {
        "format": FORMAT,
        "complete": False,
        "settings": settings,
        "sources": sources,
        "fingerprint": settings_digest({key: value for key, value in settings.items() if key not in OF_IMAGES}),
    }
    previous = before.get("shards", before.get("previous", {})) if before else own_shards(Path(folder))
    if previous:
        manifest["previous"] = previous
    write_json(Path(folder, MANIFEST), manifest)
    return manifest


@with_home
def check_complete(folder: str | Path, names: list[str]) -> dict | None:
    """The manifest of a folder whose shards are `names`, None for a folder without one (a released cache).

    Raises ValueError where it is unfinished, where a shard has another size than listed or is not listed at all;
    FileNotFoundError where a listed shard is missing.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if not manifest["complete"]:
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


@with_home
def check_shards(folder: str | Path, manifest: dict | None, paths: Sequence[str], headers: Sequence[Header]) -> None:
    """Raises ValueError where the headers of a folder's shards do not tell what its manifest lists, in its order.

    Shards that were swapped, copied over each other, or made with other settings have sizes that agree, and are found.
    """
    if manifest is None or len(paths) != len(manifest["shards"]):  # shards that were given one by one
        return
    start = 0
    for path, header in zip(paths, headers):
        found = (header.metadata.get("fingerprint"), header.metadata.get("first_image"))
        row = manifest["shards"][Path(path).name]
        count = next((entry.shape[0] for entry in header.entries.values() if entry.shape), 0)
        if "fingerprint" in manifest and found != (manifest["fingerprint"], start):
            raise ValueError(
                f"{path} is not the shard that {Path(folder, MANIFEST)} lists under its name (it begins with image "
                f"{found[1]}, not {start}, or is of other settings): shards were swapped or mixed; copy them again, or "
                "run the command that made the cache again with --verify"
            )
        if count != row.get("count", count):
            raise ValueError(f"{path} holds {count} samples, its manifest says {row['count']}: copy it again")
        start += count
    if start != manifest.get("count", start):
        raise ValueError(f"{folder} holds {start} samples, its manifest says {manifest['count']}: copy it again")
