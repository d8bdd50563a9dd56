"""`python -m prefpipe.rewards.worker MODULE:FUNCTION SECONDS [MODULE...]`: call a function for each line of its input.

Imports once (the further modules too), warms up, then lets a fork do the calls: one that hangs is killed, one that dies
takes nothing along, and the next fork costs no import. Ends when its input ends, so that it never outlives who started
it. `isolation.py` is the other side. Lines are JSON: a list of arguments in; value, status (ok, timeout, crash) and
detail out.
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
from typing import Any

_CHUNK = 1 << 16
_MEMORY_BYTES = 4 << 30  # of address space: a checker that computes 9**9**9 shall not take the machine along


@dataclass(frozen=True)
class Child:
    """A fork that answers one line after the other."""

    pid: int
    questions: int
    answers: int


def main() -> None:
    """Serve until standard input ends. What the function prints goes nowhere."""
    name, seconds, *further = sys.argv[1:]
    module, _, function_name = name.partition(":")
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    loaded = importlib.import_module(module)
    for other in further:
        importlib.import_module(other)
    if hasattr(loaded, "warm_up"):
        loaded.warm_up()
    function = getattr(loaded, function_name)
    child = None
    for line in sys.stdin.buffer:
        child = child or _fork(function)
        text, in_time = _ask(child, line, time.monotonic() + float(seconds))
        if not text:
            status = _end(child)
            child = None
            text = json.dumps(_failure(status) if in_time else _timeout(float(seconds)))
        results.write(text.strip() + "\n")
        results.flush()
    if child is not None:
        _end(child)


def answer(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    """The function's value, or what it raised."""
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
            os._exit(1)  # never what the parent would run at its exit
    os.close(asked)
    os.close(answering)
    return Child(pid, questions, answers)


def _ask(child: Child, line: bytes, deadline: float) -> tuple[str, bool]:
    """The line that answers (empty when the child ended or took too long), and whether the deadline was kept."""
    found = b""
    try:
        while line:
            line = line[os.write(child.questions, line) :]
    except BrokenPipeError:
        return "", True
    while (left := deadline - time.monotonic()) > 0:
        if select.select([child.answers], [], [], left)[0]:
            chunk = os.read(child.answers, _CHUNK)
            found += chunk
            if not chunk or found.endswith(b"\n"):
                return found.decode() if chunk else "", True
    return "", False


def _end(child: Child) -> int:
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
