"""JSON documents from disk, read with bounds: of whatever a file holds, an error is one line with its name."""

import json
from pathlib import Path
from typing import Any

from sfd_fast.files.home import with_home

LIMIT = 64 * 2**20
"""bytes; the state of a run on ten thousand ranks has two million"""


@with_home
def read_json(path: str | Path, *, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, or ValueError for anything else than one JSON object."""
    path = Path(path)
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size} bytes; at most {limit} are expected: it is no file of ours")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} cannot be read as JSON: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, but holds {type(content).__name__}")
    return content


def require_kinds(content: dict[str, Any], kinds: dict[str, type | tuple[type, ...]], path: str | Path) -> None:
    """Raises ValueError where a key is missing, or its value is of another kind."""
    for key, kind in kinds.items():
        if key not in content:
            raise ValueError(f"{path} has no '{key}': it is damaged or no file of ours")
        value = content[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{path}: '{key}' cannot be {str(value)[:60]!r}: it is damaged or no file of ours")
