"""`chat` as a process: lines in a pipe, and Ctrl-C in the middle of an answer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import assert_refused
from tests.conftest import ROOT, Cli
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.slow, pytest.mark.process]


def start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "prefpipe", "chat", *map(str, arguments)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def interrupted(process: "subprocess.Popen[str]") -> str:
    """What chat says to a Ctrl-C in the middle of an answer. On a busy machine it may come too late, at the prompt."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write("long\n")
    process.stdin.flush()
    while process.stdout.readline() != "[base]\n":
        pass
    process.stdout.read(20)  # the answer is going on
    process.send_signal(signal.SIGINT)
    return next(line.strip() for line in process.stderr if line.strip() in ("stopped", "/quit ends the chat"))


def test_lines_of_a_pipe_are_answered_and_ctrl_c_ends_an_answer(trained: Path) -> None:
    with start(trained, "--max", 900, "--temperature", 2) as process:
        assert any(interrupted(process) == "stopped" for _ in range(5))
        _, err = process.communicate("/base\n/max 3\n/temperature 0\nagain\n/quit\nnever\n", timeout=PATIENCE_S)
        assert process.returncode == 0, err
    assert err.splitlines() == ["the base is silent", "max = 3", "temperature = 0"]


def test_other_runs_are_one_error(cli: Cli, trained: Path, tmp_path: Path) -> None:
    assert_refused(cli("chat", trained.parent / "p"), 2, "is a run of build-pairs")
    assert_refused(cli("chat", tmp_path), 66, "no complete run")
