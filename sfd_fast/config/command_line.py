"""A command line as settings: every field of a dataclass tree is a flag (--train.seed 5) and a key of YAML files."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

from sfd_fast.config.checks import annotations, checked, default, flatten, unmarked
from sfd_fast.files.yaml_text import parse_yaml, read_yaml

TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def flags(kind: type, prefix: str = "") -> dict[str, Any]:
    """{full key: annotation} of every field of a dataclass tree; groups too, before their fields."""
    found = {}
    for name, annotation in annotations(kind).items():
        found[prefix + name] = annotation
        nested = unmarked(annotation)[0]
        if dataclasses.is_dataclass(nested):
            found |= flags(nested, f"{prefix}{name}.")
    return found


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ValueErrors, and which takes no beginnings of flags for the whole."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument ").replace(": expected one argument", " needs a value"))


def build_parser(
    kind: type, own: Mapping[str, dict[str, Any]], *, short: Mapping[str, str], positional: str = "", **options: Any
) -> Parser:
    """The parser of one command; what was not given is absent from its result, and values are text.

    kind: the settings; own: {name: arguments of add_argument} of flags that are none; short: {short name: full key};
    positional: the key that a word without a flag gives. options: of argparse.ArgumentParser.
    """
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)
    shorts = {full: word for word, full in short.items()}
    for name, arguments in own.items():
        parser.add_argument(f"--{name}", **arguments)
    if positional:
        parser.add_argument(positional, nargs="?", help="the same as --" + positional)
    add_settings(parser, parser, kind, shorts)
    return parser


def add_settings(parser: Parser, group: Any, kind: type, shorts: Mapping[str, str], prefix: str = "") -> None:
    """A flag for every field of a dataclass tree; each dataclass is a group of the help."""
    docs, nested = field_docs(kind), []
    for name, annotation in annotations(kind).items():
        inner, key = unmarked(annotation)[0], prefix + name
        names = [f"--{key}"] + ([f"--{shorts[key]}"] if key in shorts else [])
        if dataclasses.is_dataclass(inner):
            parser.add_argument(*names, metavar="YAML", help=argparse.SUPPRESS)
            nested.append((inner, key))
            continue
        value = default(kind, name)
        text = docs.get(name, "") + ("" if value is None or value in ("", ()) else f" (default: {value})")
        switch = {"nargs": "?", "const": "true"} if inner is bool else {}
        group.add_argument(*names, dest=key, metavar=placeholder(inner), help=text.replace("%", "%%"), **switch)
    for inner, key in nested:
        title = inspect.cleandoc(inner.__doc__ or "").splitlines()[0].rstrip(".")
        add_settings(parser, parser.add_argument_group(title), inner, shorts, f"{key}.")


def read_words(
    words: Sequence[str], parser: Parser, known: Mapping[str, Any], short: Mapping[str, str]
) -> dict[str, Any]:
    """{key: text} of what was given; - in a key is _, a switch may stand alone.

    Raises ValueError for an unknown flag, which names the nearest, for a missing value and for a word too many.
    """
    joined, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            key = name.replace("-", "_")
            full = short.get(key, key)
            if full not in known:
                raise ValueError(unknown(full, known))
            # with = a value may begin with a minus, and a switch takes no word that is no truth value
            switch = is_switch(known[full]) and full != "help"
            if not equals and rest and (is_truth(rest[0]) if switch else not rest[0].startswith("--")):
                equals, text = "=", rest.pop(0)
            elif not equals and switch:
                equals, text = "=", "true"
            word = f"--{full}{equals}{text}"
        joined.append(word)
    values, left = parser.parse_known_args(joined)
    if left:
        raise ValueError(f"unrecognized arguments: {' '.join(left)}; a setting is given as --name value")
    return vars(values)


def is_switch(annotation: Any) -> bool:
    return unmarked(annotation)[0] is bool


def is_truth(text: str) -> bool:
    return text.lower() in TRUTH


def unknown(key: str, known: Mapping[str, Any]) -> str:
    """What to say of a key that is not there."""
    near = nearest_key(key, [name for name in known if not dataclasses.is_dataclass(unmarked(known[name])[0])])
    return f"unknown setting '{key}'" + (f"; did you mean '{near}'?" if near else "")


def nearest_key(name: str, keys: Sequence[str]) -> str | None:
    """The valid key closest to a mistyped one: by its full path, then by its last word in its group, then in any, then
    whatever is least far."""
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    group, _, word = name.rpartition(".")
    within = [key for key in keys if group and key.startswith(f"{group}.")]
    for some, cutoff in ((within, 0.55), (keys, 0.7)):
        last = {key.rsplit(".", 1)[-1]: key for key in some}
        close = difflib.get_close_matches(word, last, n=1, cutoff=cutoff)
        if close:
            return last[close[0]]
    close = difflib.get_close_matches(name, within or keys, n=1, cutoff=0.0)
    return close[0] if close else None


def from_text(text: str, annotation: Any) -> Any:
    """The value that a word of the command line stands for; what fits nothing is left for the check to refuse."""
    kind = unmarked(annotation)[0]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if types.NoneType in arguments and text.lower() in ("null", "none"):
            literal = [choice for part in arguments for choice in literals(part)]
            return text if text in literal else None
        kinds = [part for part in arguments if part is not types.NoneType]
        return text if str in kinds else from_text(text, kinds[0])
    if origin is Literal:
        return next((choice for choice in arguments if str(choice) == text), text)
    if origin is tuple:
        entries = text.strip("[]() ").replace(",", " ").split()
        kinds = [arguments[0]] * len(entries) if arguments[-1] is ... else arguments
        return tuple(from_text(entry.strip("'\""), part) for entry, part in zip(entries, kinds, strict=False))
    if dataclasses.is_dataclass(kind):
        return parse_yaml(text, "the group")
    if kind is bool:
        return TRUTH.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def literals(kind: Any) -> tuple:
    kind = unmarked(kind)[0]
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def read_file(path: str, known: Mapping[str, Any], translate: Callable[[Any, str], Any]) -> dict[str, Any]:
    """The settings of a YAML file; translate(content, path) makes ours of a foreign one.

    Raises ValueError that names the file for an unknown key or a value that does not fit, OSError where it cannot be
    read.
    """
    content = translate(read_yaml(path), path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings as `name: value`")
    for key, value in flatten(content).items():
        if key not in known:
            raise ValueError(f"{path}: {unknown(key, known)}")
        if not dataclasses.is_dataclass(unmarked(known[key])[0]):
            checked(value, known[key], f"{path}: {key}")
    return content


def placeholder(kind: Any) -> str:
    """What stands for a value in the help."""
    kind = unmarked(kind)[0]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (typing.Union, types.UnionType):
        return placeholder(next(part for part in arguments if part is not types.NoneType))
    if origin is tuple:
        return f"{placeholder(arguments[0])},..."
    return {bool: "{true,false}", int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(kind, "VALUE")


def field_docs(kind: type) -> dict[str, str]:
    """The text of each field of a dataclass, inherited ones too: the docstring below it, or its line of the class's."""
    docs = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        docs |= dict(re.findall(r"^\s+(\w+): (.+)$", base.__doc__ or "", re.MULTILINE))
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        except OSError:  # made by make_dataclass
            continue
        for field, after in zip(body, body[1:]):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[field.target.id] = " ".join(text.value.split())
    return docs
