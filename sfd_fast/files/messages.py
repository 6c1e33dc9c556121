"""One line out of another library's error."""

import re


def first_line(error: Exception) -> str:
    """The first sentence of an error's message."""
    return re.split(r"\n|\. ", str(error).strip())[0][:200] or type(error).__name__
