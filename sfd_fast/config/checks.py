"""What every configuration is checked for, and configurations as plain dictionaries."""

import dataclasses
import difflib
from typing import Literal

Precision = Literal["fp32", "bf16"]


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless condition holds: for what a user got wrong."""
    if not condition:
        raise ValueError(message)


def require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} = {value} must be greater than 0")


def to_dict(config: object) -> dict:
    """A dataclass tree as plain dictionaries, ready for JSON or YAML."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict) -> object:
    """The inverse of to_dict; an unknown key is a ValueError that names the nearest valid one."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; valid keys: {', '.join(fields)}"
            raise ValueError(f"unknown key '{key}' for {kind.__name__}{hint}")
    built = {}
    for key, value in values.items():
        nested = fields[key].type
        if isinstance(nested, type) and dataclasses.is_dataclass(nested) and isinstance(value, dict):
            value = from_dict(nested, value)
        built[key] = value
    return kind(**built)
