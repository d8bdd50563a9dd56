"""`python -m prefpipe.rewards.worker MODULE:FUNCTION SECONDS [MODULE...]`: call a function once for each line of stdin.

A line of stdin is a JSON list of arguments; the line of stdout for it has value, status (ok, timeout, crash) and
detail. `isolation.py` is the other end. The process imports the modules once, warms up, and leaves the calls to a fork.
A fork that hangs is killed; the next fork costs no import. The process ends when its input ends, so that it never
outlives the process that started it.
"""

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from prefpipe.processes import current_folder

_CHUNK = 1 << 16
_MEMORY_BYTES = 4 << 30  # bytes of address space: a checker that computes 9**9**9 must not fill the memory


@dataclass(frozen=True)
class Child:
    """A fork that answers lines one after the other."""

    pid: int
    questions: int
    answers: int


def main() -> None:
    """Answer every line of standard input. Output of the function is discarded."""
    name, seconds, *further = sys.argv[1:]
    module, _, function_name = name.partition(":")
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    loaded = importlib.import_module(module)
    with current_folder():  # the further modules, and what they import later, are code of the user
        for other in further:
            importlib.import_module(other)
        if hasattr(loaded, "warm_up"):
            loaded.warm_up()
        _answer_all(getattr(loaded, function_name), float(seconds), results)


def _answer_all(function: Callable[..., Any], seconds: float, results: TextIO) -> None:
    child = None
    for line in sys.stdin.buffer:
        child = child or _fork(function)
        text, in_time = _ask(child, line, time.monotonic() + seconds)
        if not text:
            status = _end(child)
            child = None
            text = json.dumps(_failure(status) if in_time else _timeout(seconds))
        results.write(text.strip() + "\n")
        results.flush()
    if child is not None:
        _end(child)


def answer(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    """The value of the function, or the exception that it raised."""
    try:
        return {"value": function(*arguments), "status": "ok", "detail": None}
    except BaseException as error:  # a checker may even raise SystemExit
        return {"value": None, "status": "crash", "detail": f"{type(error).__name__}: {error}"[:500]}


def _fork(function: Callable[..., Any]) -> Child:
    asked, questions = os.pipe()
    answers, answering = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(questions)
            os.close(answers)
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
            with os.fdopen(asked, "rb") as lines, os.fdopen(answering, "w", encoding="utf-8") as results:
                for line in lines:
                    results.write(json.dumps(answer(function, json.loads(line))) + "\n")
                    results.flush()
        finally:
            os._exit(1)  # skips the exit handlers, which are the parent's
    os.close(asked)
    os.close(answering)
    return Child(pid, questions, answers)


def _ask(child: Child, line: bytes, deadline: float) -> tuple[str, bool]:
    """The child's line (empty when it ended or took too long), and whether it ended or answered before the deadline."""
    received = b""
    try:
        while line:
            line = line[os.write(child.questions, line) :]
    except BrokenPipeError:
        return "", True
    while (left := deadline - time.monotonic()) > 0:
        if select.select([child.answers], [], [], left)[0]:
            chunk = os.read(child.answers, _CHUNK)
            received += chunk
            if not chunk or received.endswith(b"\n"):
                return received.decode() if chunk else "", True
    return "", False


def _end(child: Child) -> int:
    """Kill the child. Returns its exit code, or minus the signal that ended it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    os.close(child.questions)
    os.close(child.answers)
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


def _timeout(seconds: float) -> dict[str, Any]:
    return {"value": None, "status": "timeout", "detail": f"more than {seconds:g} s"}


def _failure(code: int) -> dict[str, Any]:
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    return {"value": None, "status": "crash", "detail": f"the process ended with {how}"}


if __name__ == "__main__":
    main()
