"""Words go to stderr: two-line errors, and progress that says rate and remaining time without a terminal."""

import builtins
import errno
import re
import signal
import sys
from functools import partial
from io import StringIO
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from prefpipe import log
from prefpipe.errors import Interrupted


def test_an_error_is_two_lines(capfd: pytest.CaptureFixture[str]) -> None:
    log.error("it broke", "mend it")
    assert capfd.readouterr() == ("", "error: it broke\nhint: mend it\n")


def test_info_and_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    log.info("going on")
    log.warn("look here")
    assert capfd.readouterr() == ("", "going on\nwarning: look here\n")


def test_text_is_printed_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    text = "[bold]no markup[/bold] :smile: " + "a long line " * 40 + "[/]"
    log.info(text)
    log.error(text, text)
    assert capfd.readouterr().err == f"{text}\nerror: {text}\nhint: {text}\n"


def test_progress_without_a_terminal_ends_with_a_whole_line(capfd: pytest.CaptureFixture[str]) -> None:
    with log.progress("sampling", 3, "prompts") as advance:
        advance(1)
        advance(2)
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"sampling: 3/3 prompts, \d+\.\d\d/s, \d+ s, ETA 0 s\n", err)


def test_progress_of_nothing_does_not_divide_by_zero(capfd: pytest.CaptureFixture[str]) -> None:
    with log.progress("sampling", 0, "prompts"):
        pass
    assert capfd.readouterr().err.startswith("sampling: 0/0 prompts, 0.00/s, 0 s, ETA ?")


def test_progress_shows_a_line_every_few_seconds(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_PLAIN_EVERY_S", 0.0)
    with log.progress("training", 2, "steps") as advance:
        advance(1)
        advance(1)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "training: 1/2 steps",
        "training: 2/2 steps",
        "training: 2/2 steps",
    ]


def test_work_inside_a_bar_says_where_it_is_every_half_minute(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 29.0, 31.0, 31.0, 60.0, 62.0, 62.0])
    monkeypatch.setattr(log, "monotonic", lambda: next(clock))
    reached = log.remarks("judge", 9, "questions")
    for done in (1, 2, 3, 4):
        reached(done)
    assert capfd.readouterr().err == "judge: 2 of 9 questions\njudge: 4 of 9 questions\n"


def test_a_note_says_how_it_stands(capfd: pytest.CaptureFixture[str]) -> None:
    with log.progress("training", 2, "steps") as advance:
        advance(1, "loss 0.7")
        advance(1, "loss 0.6")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("training: 2/2 steps, ")
    assert line.endswith(", ETA 0 s, loss 0.6")


def test_a_bar_shows_the_note_too(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(log, "_console", lambda: console)
    with log.progress("training", 2, "steps") as advance:
        advance(2, "loss [0.6]")
    assert isinstance(console.file, StringIO)
    assert "loss [0.6]" in console.file.getvalue()


def test_an_error_inside_comes_out(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), log.progress("x", 1, "y"):
        raise ZeroDivisionError


class ZMQInteractiveShell:
    """Stands for IPython's shell in a notebook, by whose name rich knows one."""


class Output:
    """Stands for the widget into which rich draws a bar."""

    def __init__(self) -> None:
        self.drawn = 0

    def clear_output(self, wait: bool) -> None: ...

    def __enter__(self) -> None:
        self.drawn += 1

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_has_bars_where_there_are_widgets(
    widgets: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without them rich would show nothing: then it is lines."""
    shown: list[Any] = []
    shell = ZMQInteractiveShell()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr(log, "_has_widgets", lambda: widgets)
    modules = {name: ModuleType(name) for name in ("IPython", "IPython.display", "ipywidgets")}
    vars(modules["IPython.display"])["display"] = lambda *what, **_: shown.extend(what)
    vars(modules["ipywidgets"])["Output"] = Output
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with log.progress("sampling", 2, "prompts") as advance:
        advance(2)
    bars = [one for one in shown if isinstance(one, Output)]
    assert bool(bars) == widgets
    if widgets:
        assert bars[0].drawn
    else:
        assert any("sampling: 2/2 prompts" in str(vars(one) or one) for one in shown)
    assert capfd.readouterr().out == ""


class Window(StringIO):
    """A terminal whose window may close."""

    is_closed = False

    def write(self, text: str) -> int:
        if self.is_closed:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed before", "closed meanwhile"])
def test_a_bar_on_a_terminal_that_is_gone_hides_no_error(is_closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP in training: the error would be that of the bar."""
    window = Window()
    window.is_closed = is_closed
    monkeypatch.setattr(log, "_console", lambda: Console(file=window, force_terminal=True))
    monkeypatch.setattr(log, "Progress", partial(log.Progress, auto_refresh=False))  # no thread draws

    def work() -> None:
        with log.progress("sampling", 3, "prompts") as advance:
            advance(1)
            window.is_closed = True
            raise Interrupted(signal.SIGHUP)

    with pytest.raises(Interrupted):
        work()
