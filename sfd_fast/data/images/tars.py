"""WebDataset shards: tar files whose members of one sample share a name; images are read from where they lie."""

import json
import os
import tarfile
from pathlib import Path

from sfd_fast.data.images.decode import EXTENSIONS
from sfd_fast.data.images.listing import NO_CLASS, Scan, checked_label, is_hidden

BLOCK = 512
"""bytes that a tar file is counted in"""


def scan_tars(root: Path) -> Scan:
    """Members of one sample share the name up to its first dot; the label is in .cls, or else in .json (label or cls).

    Tar files may be concatenated. Where no sample of any file has a label, all are of one class.
    Raises ValueError naming tar and sample where a label is missing, the tar is truncated, or two images share a name.
    """
    tars = [root] if root.is_file() else sorted(path for path in root.glob("*.tar") if not is_hidden(path.name))
    result = Scan("tar", str(root), [], [str(path) for path in tars])
    unlabelled = ""
    for number, path in enumerate(tars):
        samples = read_samples(path, result)
        time = path.stat().st_mtime_ns
        for sample, found in samples.items():
            if "image" not in found:
                continue
            name, offset, size = found["image"]
            label = label_of(path, sample, found)
            if label is None:
                unlabelled = unlabelled or f"{path}: sample '{sample}' has no label (.cls, or .json with label or cls)"
            result.add(name, -1 if label is None else label, container=number, offset=offset, size=size, time=time)
    if not result.keys:
        raise ValueError(f"{root}: the tar files hold no images ({', '.join(EXTENSIONS)})")
    if unlabelled and max(result.labels) >= 0:
        raise ValueError(unlabelled)
    if unlabelled:
        result.labels, result.classes = [0] * len(result.keys), [NO_CLASS]
        result.notes.append(f"{root} has no labels: all of its {len(result.keys)} images are of one class")
    else:
        result.classes = [str(label) for label in range(max(result.labels) + 1)]
    return result


def label_of(path: Path, sample: str, found: dict) -> int | None:
    """The class number of a sample; None where it has neither .cls nor a .json with a label."""
    for extension in (".cls", ".json"):
        if extension not in found:
            continue
        name, content = found[extension]
        where = f"{path}: label of sample '{sample}' in '{name}'"
        if extension == ".json":
            try:
                values = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is unreadable: {error}") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where} is unreadable: it is no JSON object")
            keys = [key for key in ("label", "cls") if key in values]
            if not keys:  # captions and the like
                continue
            content = values[keys[0]]
        return checked_label(content, where)
    return None


def read_samples(path: Path, result: Scan) -> dict[str, dict]:
    """{sample: {"image": (name, offset, size), ".cls" and ".json": (name, content)}} of a tar file, in its order."""
    samples: dict[str, dict] = {}
    links = 0
    try:
        with path.open("rb") as file:
            start: int | None = 0
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    for member in archive:
                        if member.isfile():
                            add_member(path, archive, member, samples)
                        else:
                            links += member.name.lower().endswith(EXTENSIONS)
                    if start and archive.offset == start:  # tarfile says so of the first header of a file alone
                        raise tarfile.ReadError(f"what begins at byte {start} is no tar file")
                    start = next_archive(file, archive.offset)
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is no plain tar file or is truncated: {error}") from None
    if links:
        result.notes.append(f"{path}: {links} images are links or devices and are left out")
    return samples


def next_archive(file, end: int) -> int | None:
    """Where another tar file begins after the zeros that end one; None at the end of the file."""
    file.seek(end)
    while chunk := file.read(2**16):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            return end + zeros // BLOCK * BLOCK
        end += len(chunk)
    return None


def add_member(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, dict]) -> None:
    parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
    if any(map(is_hidden, parts)):
        return
    folder, base = os.path.split(member.name)
    stem, _, extension = base.partition(".")
    sample, extension = f"{folder}/{stem}" if folder else stem, "." + extension.lower()
    if extension.endswith(EXTENSIONS):
        found = samples.setdefault(sample, {})
        if "image" in found:
            raise ValueError(f"{path}: sample '{sample}' has two images, '{found['image'][0]}' and '{member.name}'")
        found["image"] = (member.name, member.offset_data, member.size)
    elif extension in (".cls", ".json"):
        samples.setdefault(sample, {})[extension] = (member.name, archive.extractfile(member).read(2**24))
