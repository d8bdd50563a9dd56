"""Stdout that nobody reads or that is full, and text of others that would command a terminal."""

import errno
import io
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefpipe import log, terminal
from prefpipe.errors import StorageError
from tests.conftest import ROOT

CLOSED = """
import os, sys
{setup}
sys.argv = ["prefpipe", *{arguments!r}]
from prefpipe.cli import main
main()
"""


def started(arguments: list[str], setup: str = "") -> "subprocess.Popen[str]":
    code = CLOSED.format(setup=setup, arguments=arguments)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("arguments", [["config", "train"], ["train", "--help"], ["--version"]])
def test_stdout_that_nobody_reads_ends_the_command_without_a_word(arguments: list[str]) -> None:
    process = started(arguments)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait() == 141


FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["config", "train"], ["train", "--help"], ["--version"]])
def test_stdout_that_is_full_is_one_error(arguments: list[str]) -> None:
    process = started(arguments, FULL)
    _, stderr = process.communicate()
    assert process.returncode == 74, stderr
    assert "No space left on device" in stderr
    assert [line.split(":")[0] for line in stderr.splitlines()] == ["error", "hint"]


def test_stdout_that_is_closed_is_one_error() -> None:
    process = started(["config", "train"], "os.close(1); sys.stdout = None")
    _, stderr = process.communicate()
    assert (process.returncode, stderr.splitlines()[0]) == (74, "error: cannot write to standard output: it is closed")


@pytest.mark.parametrize("setup", [FULL.replace("1)", "2)"), "os.close(2)", "os.close(2); sys.stderr = None"])
def test_an_error_that_cannot_be_said_keeps_its_exit_code(setup: str) -> None:
    process = started(["config", "trian"], setup)
    stdout, _ = process.communicate()
    assert (process.returncode, stdout) == (2, "")


@given(st.text(st.characters(), max_size=80))
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = terminal.escaped(text)
    kinds = {unicodedata.category(c) for c in shown}
    assert not kinds & {"Cc", "Cs", "Zl", "Zp"}
    assert not {unicodedata.bidirectional(c) for c in shown} & {"RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI", "FSI"}
    shown.encode()


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=80))
def test_text_is_shown_as_it_is(text: str) -> None:
    assert terminal.escaped(text) == text


@pytest.mark.parametrize(
    "text", ["\x1b]0;title\x07", "\x1b[2Jgone", "a\rb", "a\nerror: forged", "\x9b31m", "\u202etxt.exe", "\udcff", "\0"]
)
def test_messages_do_nothing_to_the_terminal(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    log.error(text, text)
    log.warn(text)
    log.info(text)
    with log.progress(text, 1, text) as advance:
        advance(1, text)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["error:", "hint:", "warning:"]
    assert len(lines) == 5
    assert all(line.isprintable() for line in lines), lines


@given(st.integers(0, 30_000))
def test_long_text_is_cut_in_the_middle(length: int) -> None:
    text = "a" + "b" * length + "c"
    shown = terminal.bounded(text)
    assert (shown == text) is (len(text) <= 2000)
    assert len(shown) < 2100
    assert (shown[0], shown[-1]) == ("a", "c")


def test_a_message_is_bounded(capfd: pytest.CaptureFixture[str]) -> None:
    log.error("x" * 200_000, "\x1b" * 200_000)
    assert len(capfd.readouterr().err) < 5000


class Broken(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, _text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "error"), [(errno.EPIPE, terminal.OutputClosed), (errno.EIO, StorageError)])
def test_a_broken_stream(monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(number))
    with pytest.raises(error):
        terminal.show("text")


def test_text_that_the_encoding_of_stdout_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    terminal.show("größe\n\tat \udcff \x1b[2J")
    assert raw.getvalue() == b"gr\\xf6\\xdfe\n\tat \\udcff \\x1b[2J\n"
