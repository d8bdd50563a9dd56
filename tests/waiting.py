"""Tests wait for what other processes and threads do, and never for a time."""

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
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


@contextmanager
def interruption(error: BaseException) -> Generator[Callable[[], None]]:
    """A function for other threads that raises `error` in the main thread, once, by a signal.

    It sends again until the main thread has heard: a signal that comes just before that thread waits for a lock does
    not wake it.
    """
    heard, sending = threading.Event(), threading.Lock()

    def hear(*_: object) -> None:
        if not heard.is_set():
            heard.set()
            raise error

    def send() -> None:
        while not heard.is_set():
            with sending:
                if not heard.is_set():
                    os.kill(os.getpid(), signal.SIGUSR1)
            heard.wait(1)

    before = signal.signal(signal.SIGUSR1, hear)
    try:
        yield send
    finally:
        with sending:
            heard.set()
            signal.signal(signal.SIGUSR1, before)
