"""Names of classes, and which class a name or number of a call means."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from sfd_fast.config import require
from sfd_fast.sampling.inputs import ARRAYS, Integers, whole_numbers

Labels = str | Integers | Iterable[str | int]
"""a class or several: numbers, or names that the model's id2label has"""


def checked_id2label(given: Mapping[int | str, str] | Sequence[str] | None, num_classes: int) -> dict[int, str] | None:
    """{class: its name or names}, in order of the classes; keys may be text, as in JSON, or the names a list.

    Raises ValueError for a class that the model has not, and for what is no name.
    """
    if given is None:
        return None
    require(isinstance(given, Mapping | list | tuple), "id2label must be {class number: name} or a list of names")
    pairs = given.items() if isinstance(given, Mapping) else enumerate(given)
    names: dict[int, str] = {}
    for key, name in pairs:
        number = int(key) if str(key).isdecimal() else -1
        require(
            0 <= number < num_classes and isinstance(name, str) and bool(name.strip()),
            f"id2label names class {str(key)[:20]!r} {str(name)[:40]!r}: keys are class numbers 0 to "
            f"{num_classes - 1}, values are names",
        )
        names[number] = name
    return dict(sorted(names.items()))


def shown_names(id2label: Mapping[int, str] | None, num_classes: int) -> list[str]:
    """What people are shown of every class: its first name, else its number."""
    names = id2label or {}
    return [names[i].split(",")[0].strip() if i in names else f"class {i}" for i in range(num_classes)]


def spelling(name: str) -> str:
    """Names that differ in capitals, spaces and underscores alone are the same."""
    return " ".join(name.replace("_", " ").casefold().split())


class ClassNames:
    """The classes that each name means: of "tabby, tabby cat" the whole, and each of its parts.

    A class is preferred whose whole name or first part it is: "crane" is no class alone where two have it first.
    """

    def __init__(self, id2label: Mapping[int, str] | None) -> None:
        self.id2label = id2label or {}
        self.first: dict[str, set[int]] = {}
        self.later: dict[str, set[int]] = {}
        for number, name in self.id2label.items():
            parts = [part for part in name.split(",") if part.strip()]
            for part in (name, *parts[:1]):
                self.first.setdefault(spelling(part), set()).add(number)
            for part in parts[1:]:
                self.later.setdefault(spelling(part), set()).add(number)

    @property
    def labels(self) -> dict[str, int]:
        """Every name that means one class, with it."""
        known = {name for names in (self.first, self.later) for name in names}
        return {name: next(iter(self.meant(name))) for name in sorted(known) if len(self.meant(name)) == 1}

    def meant(self, name: str) -> set[int]:
        return self.first.get(spelling(name)) or self.later.get(spelling(name)) or set()

    def number(self, name: str) -> int:
        """The class of a name, or of a number as text.

        Raises ValueError for none, for a name of several classes, and for a number that is another class's name.
        """
        meant = set(self.meant(name))
        if name.strip().isdecimal() and (not meant or int(name) in self.id2label):
            meant.add(int(name))
        if len(meant) == 1:
            return meant.pop()
        if meant:
            several = " or ".join(f"{i} ({self.id2label[i]})" for i in sorted(meant))
            raise ValueError(f"'{name}' may be several classes: give the number as a number, {several}")
        if not self.id2label:
            raise ValueError(f"'{name}' is no number, and this model has no names of classes (id2label)")
        near = difflib.get_close_matches(spelling(name), [*self.first, *self.later], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "; the pipeline's id2label has all names"
        raise ValueError(f"no class is called '{name}'{hint}")

    def numbers(self, labels: Labels) -> list[int]:
        """The classes that a call names. Raises ValueError as `number`, and for what is neither name nor number."""
        if isinstance(labels, ARRAYS) or not isinstance(labels, str | Iterable):
            return whole_numbers(labels, "class_labels").tolist()
        items = [labels] if isinstance(labels, str) else list(labels)
        return whole_numbers(
            [self.number(item) if isinstance(item, str) else item for item in items], "class_labels"
        ).tolist()
