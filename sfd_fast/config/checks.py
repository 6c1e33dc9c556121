"""The one check of every setting: the annotation of a field says what it may hold.

    @dataclass(frozen=True)
    class RunConfig(Settings, section="run"):
        out: FilePath = "runs/train"
        log_every: Annotated[int, Range(1)] = 50

A wrong value is a ValueError of one line with the field's full key, wherever it comes from: Python, a dictionary of a
YAML or JSON file, or the command line.
"""

import dataclasses
import difflib
import functools
import numbers
import os
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

Precision = Literal["fp32", "bf16"]


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number: least <= value <= most; of above < value < below the bounds themselves are not allowed."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return not (
            (self.least is not None and value < self.least)
            or (self.most is not None and value > self.most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        low, high = (a if b is None else b for a, b in ((self.least, self.above), (self.most, self.below)))
        if low is not None and high is not None:
            return f"be in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        if self.least == 0:
            return "not be negative"
        if low is not None:
            return f"be at least {low}" if self.above is None else f"be greater than {low}"
        return f"be at most {high}" if self.below is None else f"be less than {high}"


MAY_CHANGE = "may change"
"""marks a setting that may differ between a run and its continuation"""
PATH = "path"
"""marks the name of a file or folder: `~` stands for the home folder"""
FilePath = Annotated[str, PATH]
Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, below=1)]


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless condition holds: for what a user got wrong."""
    if not condition:
        raise ValueError(message)


class Settings:
    """Base of every dataclass of settings: construction checks each field by its annotation.

    section: what the keys of its fields begin with. may_change: all of them may differ between a run and its
    continuation. A subclass with rules of its own begins its __post_init__ with super().__post_init__().
    """

    section: ClassVar[str] = ""
    may_change: ClassVar[bool] = False

    def __init_subclass__(cls, *, section: str = "", may_change: bool = False, **others: Any) -> None:
        super().__init_subclass__(**others)
        cls.section, cls.may_change = section, may_change

    def __post_init__(self) -> None:
        for name, annotation in annotations(type(self)).items():
            given = getattr(self, name)
            value = checked(given, annotation, f"{self.section}.{name}".lstrip("."))
            if value is not given:
                object.__setattr__(self, name, value)


@functools.cache
def annotations(kind: type) -> dict[str, Any]:
    """The annotation of every field of a dataclass, with its marks."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def unmarked(annotation: Any) -> tuple[Any, tuple]:
    """(the type itself, its marks) of an annotation."""
    if typing.get_origin(annotation) is Annotated:
        kind, *marks = typing.get_args(annotation)
        return kind, tuple(marks)
    return annotation, ()


def checked(value: Any, annotation: Any, key: str) -> Any:
    """value as the annotation has it: a list becomes a tuple, a whole number a float, `~` in a path the home folder.

    Raises ValueError that begins with `key` where it does not fit.
    """
    kind, marks = unmarked(annotation)
    if PATH in marks and isinstance(value, os.PathLike):
        value = os.fspath(value)
    given, value = value, of_kind(value, kind, key)
    for mark in marks:
        if isinstance(mark, Range):
            for number in value if isinstance(value, tuple) else (value,):
                require(number is None or mark.holds(number), f"{key} {shown(given)} must {mark}")
        elif mark == PATH and isinstance(value, str):
            value = os.path.expanduser(value)
    return value


def of_kind(value: Any, kind: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return one_of(key, value, arguments)
    if origin in (Union, types.UnionType):
        return of_union(value, arguments, key)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{key} {shown(value)} must be a list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        require(len(kinds) == len(value), f"{key} {shown(value)} must be a list of {len(kinds)} entries")
        return tuple(checked(entry, part, f"{key}[{i}]") for i, (entry, part) in enumerate(zip(value, kinds)))
    if kind is bool:
        require(isinstance(value, bool), f"{key} {shown(value)} must be true or false")
    elif kind is int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        require(whole, f"{key} {shown(value)} must be a whole number")
        return int(value)
    elif kind is float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        require(real and abs(value) <= sys.float_info.max, f"{key} {shown(value)} must be a finite number")
        return value if type(value) is float else float(value)
    elif kind is str:
        require(isinstance(value, str), f"{key} {shown(value)} must be text")
    elif dataclasses.is_dataclass(kind):
        require(isinstance(value, kind), f"{key} {shown(value)} must be a group of settings")
    return value


def of_union(value: Any, kinds: tuple, key: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not types.NoneType]
    for kind in others:
        try:
            return checked(value, kind, key)
        except ValueError:
            continue
    return checked(value, last, key)


def shown(value: Any) -> str:
    """A value in a message of one line."""
    return reprlib.repr(value) if not isinstance(value, int | float) else str(value)[:40]


def one_of(key: str, value: Any, choices: Iterable) -> Any:
    """value, where it is one of the choices (a Literal or any sequence); else ValueError that names the nearest."""
    choices = tuple(typing.get_args(choices) or choices)
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return value
    *front, last = map(str, choices)
    near = nearest(value, choices)
    raise ValueError(
        f"{key} {shown(value)} is unknown; choose {', '.join(front)}{' or ' if front else ''}{last}"
        + ("" if near is None else f" (did you mean {near!r}?)")
    )


def nearest(value: Any, choices: Iterable) -> Any:
    """The choice closest to a mistyped value: the next number, or the most similar word; None where none is like it."""
    numeric = [choice for choice in choices if isinstance(choice, int | float)]
    if numeric and isinstance(value, int | float) and not isinstance(value, bool):
        return min(numeric, key=lambda choice: abs(choice - value))
    words = {str(choice).lower(): choice for choice in choices}
    close = difflib.get_close_matches(str(value).lower(), words, n=1, cutoff=0.5)
    return words[close[0]] if close else None


def to_dict(config: object) -> dict:
    """A dataclass tree as plain dictionaries, ready for JSON or YAML."""
    return dataclasses.asdict(config)


Config = TypeVar("Config")


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of to_dict; what is left out has its default.

    ValueError for an unknown key, which names the nearest valid one, and for a value that does not fit.
    """
    return built(kind, None, values, kind.section)


def overlaid(config: Config, changes: Mapping[str, Any]) -> Config:
    """config with some settings changed, by their keys: {"train": {"seed": 1}, "run.out": "runs/a"}.

    Raises ValueError as from_dict.
    """
    return built(type(config), config, grouped(changes), config.section)


def grouped(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as dictionaries in dictionaries: {"a.b": 1} is {"a": {"b": 1}}; later ones win."""
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        *groups, name = str(key).split(".")
        place = tree
        for group in groups:
            if not isinstance(place.get(group), dict):
                place[group] = {}
            place = place[group]
        if isinstance(value, Mapping):
            there = place.get(name)
            value = merged(there if isinstance(there, dict) else {}, grouped(value))
        place[name] = value
    return tree


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees as one; where both have a value, the second's."""
    tree = dict(first)
    for key, value in second.items():
        both = isinstance(tree.get(key), Mapping) and isinstance(value, Mapping)
        tree[key] = merged(tree[key], value) if both else value
    return tree


def built(kind: type, base: object, values: Any, where: str) -> Any:
    """A dataclass from `values`, over `base` or else over its defaults."""
    require(isinstance(values, Mapping), f"{where or kind.__name__} {shown(values)} must be a group of settings")
    known, given = annotations(kind), {}
    for key, value in values.items():
        full = f"{where}.{key}".lstrip(".")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            prefix = f"{where}." if where else ""
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"valid keys: {', '.join(known)}"
            raise ValueError(f"unknown key '{full}'; {hint}")
        nested = unmarked(known[key])[0]
        if dataclasses.is_dataclass(nested) and not isinstance(value, nested):
            value = built(nested, default(kind, key) if base is None else getattr(base, key), value, full)
        given[key] = value
    if base is not None:
        return dataclasses.replace(base, **given)
    for field in dataclasses.fields(kind):
        there = field.name in given or not (field.default is field.default_factory is dataclasses.MISSING)
        require(there, f"{where}.{field.name}".lstrip(".") + " is missing and has no default")
    return kind(**given)


def default(kind: type, name: str) -> Any:
    """The default of a dataclass's field; None where it has none."""
    field = next(field for field in dataclasses.fields(kind) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def changeable(kind: type) -> frozenset[str]:
    """The keys, below a configuration of this kind, of all settings that may differ when a run goes on."""
    return marked(kind, MAY_CHANGE)


def marked(kind: type, mark: object, prefix: str = "") -> frozenset[str]:
    """The keys, below a configuration of this kind, of all settings with a mark."""
    keys: set[str] = set()
    for name, annotation in annotations(kind).items():
        nested, marks = unmarked(annotation)
        if dataclasses.is_dataclass(nested):
            keys |= marked(nested, mark, f"{prefix}{name}.")
        elif mark in marks or (mark == MAY_CHANGE and kind.may_change):
            keys.add(prefix + name)
    return frozenset(keys)
