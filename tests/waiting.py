"""Tests wait for what other processes and threads do, and never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 600.0  # with a machine that is busy; a test as a whole has 900


def until(found: Callable[[], T]) -> T:
    """What a function finds, as soon as it finds something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value
