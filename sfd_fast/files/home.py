"""`~` in front of a path stands for the home folder, in Python as on the command line."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def with_home(function: Callable[P, R]) -> Callable[P, R]:
    """function, given its text and path arguments with `~` expanded, also within a list; for what takes paths."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*map(expanded, args), **{name: expanded(value) for name, value in kwargs.items()})

    return wrapper


def expanded(value: Any) -> Any:
    """A path as it is meant; what is none stays as it is."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~") else value
    if isinstance(value, Path):
        return Path(os.path.expanduser(value)) if value.parts[:1] and value.parts[0].startswith("~") else value
    if type(value) in (list, tuple):
        return type(value)(map(expanded, value))
    return value
