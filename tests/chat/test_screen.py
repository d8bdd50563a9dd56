"""Answers in a pipe and on a terminal; text of a model does nothing to it."""

import io

import pytest
from rich.console import Console

from prefpipe.chat import screen


def test_in_a_pipe_answers_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with screen.answers(["base", "policy"]) as show:
        for name, text in (("base", "on"), ("base", "e\n"), ("policy", "\x1b[2Jtwo")):
            show(name, text)
    assert capsys.readouterr().out == "[base]\none\n\n[policy]\n\\x1b[2Jtwo\n"


def test_one_voice_has_no_heading(capsys: pytest.CaptureFixture[str]) -> None:
    with screen.answers(["policy"]) as show:
        show("policy", "two")
    assert capsys.readouterr().out == "two\n"


def test_on_a_terminal_they_stand_beside_each_other() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=40, color_system=None)
    with screen.answers(["base", "policy"], console) as show:
        show("base", "one [bold]\x1b[2J")
        show("policy", "two")
    last = written.getvalue().splitlines()[-2:]
    assert [line.rstrip() for line in last if "two" in line] == ["one [bold]\\x1b[2J   two"]
