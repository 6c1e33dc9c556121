"""YAML has the numbers of YAML 1.2; what is malformed or a bomb is one line with the file's name, in seconds."""

import math
import time

import pytest

from sfd_fast.files.yaml_text import MAX_BYTES, parse_yaml, read_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("-2e3", -2000.0), (".5", 0.5), ("1.", 1.0), ("6.02e+23", 6.02e23), ("3", 3),
     ("-3", -3), ("+12", 12), ("0x1F", 31), ("1:30", "1:30"), ("010", "010"), ("e5", "e5"), ("1e", "1e"),
     ("1.5.2", "1.5.2"), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"), ("-.inf", -math.inf), ("'1e-4'", "1e-4"),
     ("true", True), ("null", None), ("", None)],
)  # fmt: skip
def test_scalars(text, value):
    found = parse_yaml(text, "a.yaml")
    assert found == value and type(found) is type(value)


def test_not_a_number():
    assert math.isnan(parse_yaml("x: .nan", "a.yaml")["x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [(LAUGHS, "more than 100000 values"), (MERGES, "more than 100000 values"), ("a: &a [*a]", "contains itself"),
     ("[" * 100_000, "nested too deeply"), ("[" * 150 + "]" * 150, "nested more than 100 deep"),
     ("".join(" " * i + "a:\n" for i in range(300)), "nested more than 100 deep"), ("9" * 5000, "4300 digits"),
     ("!!int '" + ":".join(["1"] * 50_000) + "'", "invalid literal"), ("!!float ''", "could not convert"),
     ("!!python/object/apply:os.getcwd []", "could not determine a constructor"), ("a:\n\t- b", "cannot start"),
     ("!!binary 'x'", "base64"), ("? [a]\n: b", "unhashable"), ("a\n---\nb", "single document"), ("a: [", "")],
)  # fmt: skip
def test_what_is_malformed_is_one_line(text, message):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml(text, "a.yaml")
    assert str(error.value).startswith("a.yaml is no valid YAML: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.monotonic() - start < 60


def test_files(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lr: 1e-4\n")
    assert read_yaml(file) == {"lr": 1e-4}
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="a.yaml is no valid YAML: it is not text"):
        read_yaml(file)
    file.write_text("x" * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match="may have at most"):
        read_yaml(file)
    with pytest.raises(OSError):
        read_yaml(tmp_path / "absent.yaml")
