"""Hugging Face datasets as sources of images: saved ones, folders of Parquet files, and the hub's."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfd_fast.data.images.listing import NO_CLASS, Scan, checked_label, is_hidden
from sfd_fast.files.messages import first_line

HUB = "hf://"
IMAGE_NAMES = ("image", "img", "picture", "jpg", "png")
LABEL_NAMES = ("label", "labels", "cls", "class")
"""names of columns, tried in this order before their types"""


def is_dataset(root: Path) -> bool:
    """Whether a folder was saved by `datasets`, or holds Parquet files."""
    return any((root / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")) or bool(parquet(root))


def parquet(root: Path) -> list[Path]:
    """The Parquet files of a folder: in it, in its data/, or in its train/."""
    for folder in (root, root / "data", root / "train"):
        found = sorted(path for path in folder.glob("*.parquet") if not is_hidden(path.name))
        if found:
            return found
    return []


def train_split(address: str, files: list[Path], note: Callable[[str], None]) -> list[Path]:
    """Of files named as the hub does (train-00000-of-00004.parquet) those of `train`; all, where none is named so."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        named = re.match(r"([A-Za-z]+)(?:-\d|\.parquet)", path.name)
        splits.setdefault(named[1].lower() if named else "", []).append(path)
    if len(splits) < 2:
        return files
    if "train" not in splits:
        if splits.keys() <= {"test", "validation", "valid", "val", "dev"}:
            raise ValueError(f"{address} has the splits {', '.join(sorted(splits))} and no 'train': give one's folder")
        return files
    others = ", ".join(f"{name or 'others'} ({len(found)} files)" for name, found in splits.items() if name != "train")
    note(f"{address}: the split 'train' is taken, left out: {others}")
    return splits["train"]


def scan_dataset(address: str) -> Scan:
    """Rows of a Hugging Face dataset: its image column, and its label column (a ClassLabel or integers).

    A dataset without labels is of one class. Raises ValueError naming row and value of a label that is no class number.
    """
    notes: list[str] = []
    rows = open_dataset(address, notes.append)
    count = len(rows)
    if count == 0:
        raise ValueError(f"{address} has no rows")
    result = Scan("dataset", address, [], notes=notes)
    name = column(rows, "label")
    if name is None:
        labels, result.classes = [0] * count, [NO_CLASS]
        notes.append(f"{address} has no labels ({', '.join(rows.features)}): all of its images are of one class")
    else:
        labels = [checked_label(value, f"{address}: '{name}' of row {i}") for i, value in enumerate(rows[name])]
        feature = rows.features[name]
        result.classes = list(getattr(feature, "names", None) or map(str, range(max(labels) + 1)))
    notes.append(f"{address}: images are column '{column(rows, 'image')}', labels {f'column {name!r}' if name else 0}")
    time = written(address)
    for i, label in enumerate(labels):
        result.add(str(i), label, time=time)
    return result


def written(address: str) -> int:
    """When the newest file of a dataset was written, ns; 0 for the hub's."""
    if address.startswith(HUB):
        return 0
    return max((path.stat().st_mtime_ns for path in Path(address).rglob("*") if path.is_file()), default=0)


def open_dataset(address: str, note: Callable[[str], None] = lambda text: None) -> Any:
    """The train split of a saved dataset, of a folder of Parquet files, or of the hub, images left encoded."""
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{address} is a Hugging Face dataset: pip install datasets") from None
    files = [] if address.startswith(HUB) else parquet(Path(address))
    chosen = [str(path) for path in train_split(address, files, note)]
    try:
        if address.startswith(HUB):
            rows = datasets.load_dataset(address.removeprefix(HUB), split="train")
        else:
            rows = datasets.Dataset.from_parquet(chosen) if chosen else datasets.load_from_disk(address)
    except Exception as error:  # datasets, pyarrow and the hub's client raise many kinds
        raise ValueError(f"{address} cannot be read as a dataset: {first_line(error)}") from error
    if isinstance(rows, datasets.DatasetDict):
        if "train" not in rows:
            raise ValueError(f"{address} has the splits {', '.join(rows)} and no 'train': give one split's folder")
        left = [name for name in rows if name != "train"]
        if left:
            note(f"{address}: the split 'train' is taken, left out: {', '.join(left)}")
        rows = rows["train"]
    name = column(rows, "image")
    if name is None:
        raise ValueError(f"{address} has no image column; its columns are {', '.join(rows.features)}")
    return rows.cast_column(name, datasets.Image(decode=False))


def column(rows: Any, wanted: str) -> str | None:
    """The column of images or of labels: by its name, or else the first of the type; None where there is none."""
    import datasets

    names, kind = (IMAGE_NAMES, datasets.Image) if wanted == "image" else (LABEL_NAMES, datasets.ClassLabel)
    by_type = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    return next((name for name in names if name in rows.features), by_type[0] if by_type else None)
