"""Every `sfd` command line of README.md and docs/ is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from sfd_fast import cli

ROOT = Path(__file__).resolve().parents[1]
START = re.compile(r"(?:\bsfd |-m sfd_fast |--module sfd_fast )(.*)")


def command_lines():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                command = START.search(line.split(" #")[0])
                if command:
                    yield pytest.param(command[1].strip(), id=f"{page.name}: {' '.join(command[1].split())[:60]}")


def test_there_are_command_lines_to_read():
    assert len(list(command_lines())) > 20


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_of_the_docs_is_understood(line, capsys):
    name, *words = (word for word in shlex.split(line) if word != "...")
    try:
        cli.parse(name, words)
    except SystemExit as done:  # --help and --print-config
        assert done.code == 0
