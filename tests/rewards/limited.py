"""A reward of a user's that does what its one completion asks for. Little is imported: other processes do it again."""

import importlib
import os
import signal
import time
from typing import Any

IMPORTED_BY = os.getpid()


def exit_with(code: int) -> None:
    raise SystemExit(code)


def behave(completions: list[Any], answer: list[Any], **columns: Any) -> Any:
    (turns,), (expected,) = completions, answer
    return {
        "hang": lambda: time.sleep(600),
        "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "exit": lambda: exit_with(3),
        "raise": lambda: 1 / 0,
        "nothing": lambda: [None],
        "numpy": lambda: importlib.import_module("numpy").full(1, 0.25),
        "level": lambda: columns["level"],
        "expected": lambda: [len(expected)],
        "imported before": lambda: [os.getppid() == IMPORTED_BY],
        "two": lambda: [1.0, 2.0],
    }[turns[0]["content"]]()
