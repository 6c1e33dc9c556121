"""What scanning a source gives: its images in a fixed order; and what names and labels all sources may have."""

import numbers
from dataclasses import dataclass, field
from typing import Any

from sfd_fast.data.cache.layout import MAX_CLASSES

NO_CLASS = "all"
"""the one class of images without labels"""


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
    times: list[int] = field(default_factory=list)
    """when the image's file, or the file that holds it, was last written, ns; 0 where nothing tells"""
    unreadable: dict[str, str] = field(default_factory=dict)
    """what cannot be listed, and why"""
    notes: list[str] = field(default_factory=list)
    """what the user should know, for example of ignored files"""

    def add(self, key: str, label: int, *, container: int = 0, offset: int = 0, size: int = 0, time: int = 0) -> None:
        """One more image; a name that is not UTF-8 is listed as unreadable."""
        try:
            key.encode()
        except UnicodeEncodeError:
            shown = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            self.unreadable[shown] = "its name is not UTF-8: rename it"
            return
        self.keys.append(key)
        self.labels.append(label)
        self.container.append(container)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.times.append(time)


def is_hidden(name: str) -> bool:
    """Whether a name is none of the user's: .name, ._name and __MACOSX of macOS, .ipynb_checkpoints."""
    return name.startswith(".") or name == "__MACOSX"


def checked_label(value: Any, where: str) -> int:
    """A class number as it stands in a source: a whole number, or its digits. ValueError tells where it is none."""
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    if isinstance(value, str):
        number = int(value) if len(value) < 20 and value.strip().isdecimal() else None
    else:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        number = int(value) if whole else None
    if number is None or not 0 <= number < MAX_CLASSES:
        raise ValueError(
            f"{where} is {str(value)[:40]!r}: a label is a whole number from 0 to {MAX_CLASSES - 1}; number the classes"
        )
    return number
