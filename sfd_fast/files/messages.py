"""One line for the user out of any error."""

import contextlib
import re
from collections.abc import Iterator


def first_line(error: Exception) -> str:
    """The first sentence of an error's message."""
    return re.split(r"\n|\. ", str(error).strip())[0][:200] or type(error).__name__


@contextlib.contextmanager
def naming(source: object) -> Iterator[None]:
    """Around the reading of a file from elsewhere: whatever its content leads to is a ValueError that names the file.

    Errors of the system (OSError) and ValueErrors that name it already pass as they are.
    """
    try:
        yield
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ValueError(
            f"{source} is malformed, or not what it is taken for ({type(error).__name__}: {first_line(error)})"
        ) from error
