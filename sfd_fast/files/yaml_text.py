"""YAML from strangers: read safely, with numbers as YAML 1.2 has them, and with bounds on size, depth and aliases.

PyYAML follows YAML 1.1, where 1e-4 is text and 1:30 is ninety. Aliases let a file of a few lines stand for billions of
values; whoever walks through them never ends.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from sfd_fast.files.home import with_home

MAX_BYTES = 2**18
MAX_DEPTH = 100
MAX_VALUES = 100_000
"""with every alias counted as what it stands for"""


TAG = "tag:yaml.org,2002:"
INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$|0x[0-9a-fA-F]+$")
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class Loader(yaml.SafeLoader):
    """SafeLoader with the whole numbers and floats of YAML 1.2, and dates as text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in (TAG + "int", TAG + "float", TAG + "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(TAG + "int", INT, list("-+0123456789"))
Loader.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))
Loader.add_constructor(TAG + "int", lambda loader, node: int(loader.construct_scalar(node), 0))
Loader.add_constructor(TAG + "float", lambda loader, node: to_float(loader.construct_scalar(node)))


def to_float(text: str) -> float:
    """.inf and .nan have a dot in YAML, none in Python."""
    return float(text.replace(".", "") if text[-1:].isalpha() else text)


@with_home
def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds. Raises OSError, or ValueError of one line that names the file."""
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a YAML file may have at most {MAX_BYTES}")
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no valid YAML: it is not text in UTF-8") from None
    return parse_yaml(text, path)


def parse_yaml(text: str, source: object) -> Any:
    """The value of a YAML text. Raises ValueError of one line that begins with `source`."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"{source} has {len(text)} characters; YAML may have at most {MAX_BYTES}")
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        check_bounds(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"{source} is no valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{source} is no valid YAML: {' '.join(str(error).split())[:300]}") from None
    finally:
        if loader is not None:
            loader.dispose()


def check_bounds(root: yaml.Node) -> None:
    """Raises ValueError where a tree is too deep, contains itself, or has too many values, aliases written out."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if id(node) in open_nodes:
            raise ValueError("an alias contains itself")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
            open_nodes.remove(id(node))
        if sizes[id(node)] > MAX_VALUES:
            raise ValueError(f"it stands for more than {MAX_VALUES} values, aliases written out")
        return sizes[id(node)]

    size(root, 0)
