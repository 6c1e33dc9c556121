"""Puts tables made from result files into a README, between <!-- NAME --> and <!-- /NAME -->."""

from pathlib import Path

KERNELS_README = Path(__file__).resolve().parents[1] / "kernels" / "README.md"


def section(path: Path, name: str) -> tuple[str, str, str]:
    """What stands before, in and after a section of a file; ValueError without its marks."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = path.read_text().partition(start)
    inside, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path} has no section '{name}': put the lines <!-- {name} --> and {end} where it belongs")
    return before + start, inside, end + after


def insert(path: Path, name: str, text: str) -> None:
    """Replaces a section by text."""
    before, _, after = section(path, name)
    path.write_text(f"{before}{text}\n{after}")
