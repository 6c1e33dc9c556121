"""The names of ImageNet's 1000 classes, in the order of its labels.

imagenet_classes.txt has one line per class: its WordNet number, a tab, its names separated by commas.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

NUM_CLASSES = 1000


@cache
def rows() -> tuple[tuple[str, str], ...]:
    """(WordNet number, names) of every class."""
    text = files("sfd_fast.formats").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple((number, names) for number, _, names in (line.partition("\t") for line in text.splitlines()))


def imagenet_names(num_classes: int = NUM_CLASSES) -> dict[int, str] | None:
    """{class: names} of a model of ImageNet's classes; None for one of another number of classes."""
    return {i: names for i, (_, names) in enumerate(rows())} if num_classes == NUM_CLASSES else None


def spelled_out(folders: Sequence[str]) -> list[str]:
    """Names of classes for people: folders that are called by WordNet numbers of ImageNet get its names, all others
    stay."""
    names = dict(rows())
    return [names.get(folder, folder) for folder in folders]
