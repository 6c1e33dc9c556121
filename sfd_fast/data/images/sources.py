"""Where images come from: a class-per-folder tree, WebDataset tar shards, or a Hugging Face dataset.

Scanning lists the images without decoding any; a Reader fetches the encoded bytes of one of them.
"""

import json
import os
import tarfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfd_fast.data.images.decode import EXTENSIONS

HUB = "hf://"


@dataclass
class Scan:
    """The images of a source, in a fixed order; parallel lists of equal length."""

    kind: str
    """folder, tar or dataset"""
    root: str
    classes: list[str]
    containers: list[str] = field(default_factory=list)
    """tar files that `container` numbers"""
    keys: list[str] = field(default_factory=list)
    """name of each image: path below root, member of its tar file, or row number"""
    labels: list[int] = field(default_factory=list)
    container: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """first byte within the tar file"""
    sizes: list[int] = field(default_factory=list)
    """encoded bytes; 0 where only reading tells"""
    notes: list[str] = field(default_factory=list)
    """what the user should know, for example of ignored files"""


def scan(path: str | Path) -> Scan:
    """Lists the images of a source; the kind is recognised from what is there.

    A folder with *.tar files and no class folders, or one such file: WebDataset. A folder saved by `datasets` or with
    *.parquet files, or hf://ORGANISATION/NAME: a Hugging Face dataset. Any other folder: one sub-folder per class.
    Raises FileNotFoundError for a missing path, ValueError for a source without images, or a class without any.
    """
    if str(path).startswith(HUB):
        return scan_dataset(str(path))
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(
            f"{root} does not exist; images are a folder with one sub-folder per class, *.tar shards (WebDataset), or "
            "a saved Hugging Face dataset"
        )
    tars = sorted(path.name for path in root.glob("*.tar"))
    if root.is_file() or (tars and not has_class_folders(root)):
        return scan_tars(root)
    if (root / "dataset_info.json").is_file() or (root / "dataset_dict.json").is_file() or any(root.glob("*.parquet")):
        return scan_dataset(str(root))
    found = scan_folder(root)
    if tars:
        found.notes.append(f"{root} has class folders: its {len(tars)} *.tar files, such as {tars[0]}, are ignored")
    return found


def has_class_folders(root: Path) -> bool:
    """Whether a sub-folder holds an image, at any depth."""
    folders = (entry.path for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    return any(
        file.lower().endswith(EXTENSIONS)
        for folder in folders
        for _, _, files in os.walk(folder, followlinks=True)
        for file in files
    )


def scan_folder(root: Path) -> Scan:
    """One class per sub-folder of root, labels in the order of their sorted names; deeper folders belong to it."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} has no sub-folders: one folder per class is expected, with images in it")
    result = Scan("folder", str(root), classes)
    for label, name in enumerate(classes):
        before = len(result.keys)
        for folder, folders, files in os.walk(root / name, followlinks=True):
            folders.sort()
            for file in sorted(files):
                if file.lower().endswith(EXTENSIONS):
                    full = os.path.join(folder, file)
                    result.keys.append(os.path.relpath(full, root))
                    # a dangling link is found, and listed, when it is read
                    result.sizes.append(os.path.getsize(full) if os.path.exists(full) else 0)
        count = len(result.keys) - before
        if count == 0:
            raise ValueError(
                f"class folder {root / name} holds no images ({', '.join(EXTENSIONS)}): remove the folder, or fill it"
            )
        result.labels += [label] * count
    result.container = [0] * len(result.keys)
    result.offsets = [0] * len(result.keys)
    return result


def scan_tars(root: Path) -> Scan:
    """WebDataset shards: members of one sample share the name up to its first dot; the label is in .cls or .json.

    Raises ValueError naming tar and sample where a label is missing, the tar is truncated, or two images share a name.
    """
    tars = [root] if root.is_file() else sorted(root.glob("*.tar"))
    result = Scan("tar", str(root), [], [str(path) for path in tars])
    for number, path in enumerate(tars):
        images: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        _tar_member(path, archive, member, images, labels)
        except tarfile.ReadError as error:
            raise ValueError(f"{path} is no plain tar file or is truncated: {error}") from None
        for sample, (name, offset, size) in images.items():
            if sample not in labels:
                raise ValueError(f"{path}: sample '{sample}' has no label (.cls, or .json with label or cls)")
            result.keys.append(name)
            result.labels.append(labels[sample])
            result.container.append(number)
            result.offsets.append(offset)
            result.sizes.append(size)
    if not result.keys:
        raise ValueError(f"{root}: the tar files hold no images ({', '.join(EXTENSIONS)})")
    result.classes = [str(label) for label in range(max(result.labels) + 1)]
    return result


def _tar_member(
    path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, images: dict, labels: dict[str, int]
) -> None:
    folder, base = os.path.split(member.name)
    stem, _, extension = base.partition(".")
    sample, extension = f"{folder}/{stem}" if folder else stem, "." + extension.lower()
    if extension.endswith(EXTENSIONS):
        if sample in images:
            raise ValueError(f"{path}: sample '{sample}' has two images, '{images[sample][0]}' and '{member.name}'")
        images[sample] = (member.name, member.offset_data, member.size)
    elif extension in (".cls", ".json"):
        try:
            labels[sample] = _label(extension, archive.extractfile(member).read().decode())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: label of sample '{sample}' in '{member.name}' is unreadable: {error}") from None


def _label(extension: str, content: str) -> int:
    """The class number in a .cls or .json member."""
    if extension == ".cls":
        label = int(content)
    else:
        values = json.loads(content)
        found = [values[key] for key in ("label", "cls") if key in values] if isinstance(values, dict) else []
        if not found:
            raise ValueError("it has neither 'label' nor 'cls'")
        label = int(found[0])
    if label < 0:
        raise ValueError(f"{label} is negative")
    return label


def scan_dataset(address: str) -> Scan:
    """Rows of a Hugging Face dataset: its image column, and its label column (a ClassLabel or integers)."""
    rows = open_dataset(address)
    labels = rows[_column(rows, "label", address)]
    feature = rows.features[_column(rows, "label", address)]
    classes = list(feature.names) if hasattr(feature, "names") else [str(i) for i in range(max(labels) + 1)]
    count = len(rows)
    return Scan(
        "dataset", address, classes, [], [str(i) for i in range(count)], [int(label) for label in labels],
        [0] * count, [0] * count, [0] * count,
    )  # fmt: skip


def open_dataset(address: str) -> Any:
    """The train split of a saved dataset, of a folder of Parquet files, or of the hub, images left encoded."""
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{address} is a Hugging Face dataset: pip install datasets") from None
    if address.startswith(HUB):
        rows = datasets.load_dataset(address.removeprefix(HUB), split="train")
    elif files := sorted(str(path) for path in Path(address).glob("*.parquet")):
        rows = datasets.Dataset.from_parquet(files)
    else:
        rows = datasets.load_from_disk(address)
    if isinstance(rows, datasets.DatasetDict):
        if "train" not in rows:
            raise ValueError(f"{address} has the splits {', '.join(rows)} and no 'train': give one split's folder")
        rows = rows["train"]
    return rows.cast_column(_column(rows, "image", address), datasets.Image(decode=False))


def _column(rows: Any, wanted: str, address: str) -> str:
    import datasets

    kinds = {"image": datasets.Image, "label": datasets.ClassLabel}
    for name, feature in rows.features.items():
        if isinstance(feature, kinds[wanted]):
            return name
    if wanted in rows.features:
        return wanted
    raise ValueError(f"{address} has no {wanted} column; its columns are {', '.join(rows.features)}")


class Reader:
    """Encoded bytes of the images of a scan, by any number of threads."""

    def __init__(self, kind: str, root: str, containers: list[str]):
        self.kind, self.root, self.containers = kind, root, containers
        self._rows: Any = None
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, key: str, container: int, offset: int, size: int) -> bytes:
        """Raises OSError naming the file where it cannot be read."""
        if self.kind == "folder":
            with open(os.path.join(self.root, key), "rb") as file:
                return file.read()
        if self.kind == "tar":
            with self._lock:
                if container not in self._files:
                    self._files[container] = os.open(self.containers[container], os.O_RDONLY)
            return os.pread(self._files[container], size, offset)
        with self._lock:
            if self._rows is None:
                self._rows = open_dataset(self.root)
                self._image = _column(self._rows, "image", self.root)
            value = self._rows[int(key)][self._image]
        if value is None:
            raise OSError(f"{self.root}: row {key} has no image")
        if value["bytes"] is not None:
            return value["bytes"]
        with open(value["path"], "rb") as file:
            return file.read()

    def describe(self, key: str, container: int) -> str:
        """A name of the image that tells a person where it is."""
        if self.kind == "folder":
            return os.path.join(self.root, key)
        if self.kind == "tar":
            return f"{self.containers[container]}:{key}"
        return f"{self.root}: row {key}"

    def __del__(self) -> None:
        for number in self._files.values():
            os.close(number)


