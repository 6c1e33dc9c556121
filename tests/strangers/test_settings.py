"""Settings of every command from strangers: whatever is wrong with them is one line with the key, at once."""

import dataclasses
import time
import types
import typing

import pytest

from sfd_fast import cli
from sfd_fast.config.checks import PATH, Range, checked, unmarked
from sfd_fast.config.command_line import flags, from_text

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)
NEEDED = {
    "convert": ["--source", "a", "--target", "b"], "evaluate": ["--samples", "a", "--reference", "b"],
    "download": ["--what", "codec"],
}  # fmt: skip
"""what a command cannot do without"""


def kind_of(annotation):
    """The type behind marks and `| None`."""
    kind = unmarked(annotation)[0]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = unmarked(next(part for part in typing.get_args(kind) if part is not types.NoneType))[0]
    return kind


def settings():
    """(command, key, annotation) of every setting of every command, groups left out."""
    for name, command in cli.COMMANDS.items():
        for key, annotation in flags(cli.load(command.config)).items():
            if not dataclasses.is_dataclass(unmarked(annotation)[0]):
                yield name, key, annotation


CHOICES = [(c, k) for c, k, a in settings() if typing.get_origin(kind_of(a)) is typing.Literal]
NUMBERS = [(c, k, kind_of(a)) for c, k, a in settings() if kind_of(a) in (int, float)]
LIMITED = [
    (command, key, mark)
    for command, key, annotation in settings()
    for mark in unmarked(annotation)[1]
    if isinstance(mark, Range) and kind_of(annotation) is int
]
PATHS = [
    (command, key)
    for command, key, annotation in settings()
    if any(PATH in unmarked(part)[1] for part in (annotation, *typing.get_args(annotation)))
]


def refused(capsys, command, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *NEEDED.get(command, []), *words])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sfd {command}: error: ") and error.count("\n") == 1 and len(error) < 600
    return error


def test_there_is_something_to_try():
    assert len(CHOICES) > 40 and len(NUMBERS) > 100 and len(LIMITED) > 50 and len(PATHS) > 40


@pytest.mark.parametrize(("command", "key"), CHOICES)
def test_a_choice_that_is_none_is_refused_with_its_key(capsys, command, key):
    assert f"{key} 'nonsense' is unknown; choose " in refused(capsys, command, f"--{key}=nonsense")


@pytest.mark.parametrize(("command", "key", "kind"), NUMBERS)
def test_what_is_no_number_is_refused_with_its_key(capsys, command, key, kind):
    for text in ("many", "nan", "4.5" if kind is int else "inf", "true", ""):
        message = "must be a whole number" if kind is int else "must be a finite number"
        error = refused(capsys, command, f"--{key}={text}")
        assert f"{key} " in error and message in error


@pytest.mark.parametrize(("command", "key", "limit"), LIMITED)
def test_a_number_out_of_its_range_is_refused_with_its_key(capsys, command, key, limit):
    error = refused(capsys, command, f"--{key}={limit.least - 1}")
    assert f"{key} {limit.least - 1} must " in error


@pytest.mark.parametrize(("command", "key"), PATHS)
def test_the_home_folder_may_be_a_tilde_in_every_path(monkeypatch, command, key):
    """Some paths contradict settings that are not given with them, so only the one setting is made."""
    monkeypatch.setenv("HOME", "/home/someone")
    annotation = flags(cli.load(cli.COMMANDS[command].config))[key]
    assert checked(from_text("~/x", annotation), annotation, key) == "/home/someone/x"


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize(
    ("content", "message"),
    [(BOMB, "stands for more than 100000 values"), ("[" * 20_000, "nested too deeply"), ("a: [", "is no valid YAML"),
     ("- 1\n", "must hold settings as `name: value`"), ("x" * 300_000, "bytes"),
     (b"\xff\xfe\x00\x01", "is no valid YAML"), ("colour: blue\n", "unknown setting 'colour'")],
    ids=["bomb", "deep", "torn", "list", "large", "binary", "unknown"],
)  # fmt: skip
def test_a_file_that_holds_no_settings_is_one_line_with_its_name(tmp_path, capsys, command, content, message):
    file = tmp_path / "a.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.monotonic()
    error = refused(capsys, command, "--config", str(file))
    assert "a.yaml" in error and message in error
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_file_that_is_not_there_is_one_line_with_its_name(tmp_path, capsys, command):
    assert "absent.yaml" in refused(capsys, command, "--config", str(tmp_path / "absent.yaml"))
    assert str(tmp_path) in refused(capsys, command, "--config", str(tmp_path))
