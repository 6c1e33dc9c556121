"""Every citation of the method, in code and tests, names a section of docs/METHOD.md that exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = [f"{folder}/**/*.{kind}" for folder in ("sfd_fast", "kernels", "tests", "benchmarks") for kind in ("py", "cpp")]
FILES = [path for pattern in KINDS for path in sorted(ROOT.glob(pattern)) if path != Path(__file__)]
SECTIONS = set(re.findall(r"^## (\d+)\. ", (ROOT / "docs/METHOD.md").read_text(), re.MULTILINE))
CITATION = re.compile(r"docs/METHOD\.md(?: (\d+(?:(?:, | and | to )\d+)*))?")


def citations(text: str) -> list[list[str]]:
    """The section numbers of each citation in a text; none for one that names no section."""
    return [re.findall(r"\d+", match[1] or "") for match in CITATION.finditer(text)]


def test_the_method_has_its_sections_in_order():
    assert sorted(SECTIONS, key=int) == [str(number) for number in range(1, len(SECTIONS) + 1)]


def test_citations_are_found_and_their_sections_read():
    """An oracle for the test below: it would pass on anything if it found nothing."""
    name = "docs/METHOD" + ".md"
    assert citations(f"(a; {name} 2, 6) {name} 4 and 5. {name} alone") == [["2", "6"], ["4", "5"], []]
    assert sum(len(citations(path.read_text())) for path in FILES) > 60


def test_every_citation_names_a_section_that_exists():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"(?<!docs/)METHOD(?:\.md)? ?\d|DESIGN", text), f"{path}: write docs/METHOD.md N"
        for sections in citations(text):
            assert sections and set(sections) <= SECTIONS, f"{path} cites {sections or 'no section'}"
