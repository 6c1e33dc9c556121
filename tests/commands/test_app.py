"""`sfd app` before the page: its options, and Gradio that is not installed."""

import sys

import pytest

from sfd_fast.cli import main, parse
from sfd_fast.commands.app import AppConfig


def test_without_gradio_one_line_names_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        main(["app", "--model", "no-such-folder"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sfd app: error: the page needs Gradio")
    assert line.endswith("pip install 'sfd-fast[app]'")


def test_a_model_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(["app"])
    assert capsys.readouterr().err == (
        "sfd app: error: model is empty; give a pipeline folder, for example --model runs/demo/model\n"
    )


@pytest.mark.parametrize(("options", "message"), [({"batch": 0}, "batch 0"), ({"port": 70000}, "port 70000")])
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AppConfig(**options)


def test_options_are_read_from_the_command_line():
    assert parse("app", ["--model", "m", "--twin", "t", "--port", "8000"]) == AppConfig(model="m", twin="t", port=8000)
