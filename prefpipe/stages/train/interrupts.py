"""SIGTERM, SIGINT and SIGHUP in training: noted at once, obeyed when the step is done and its checkpoint is there."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from prefpipe import log
from prefpipe.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def noted() -> Generator[Callable[[], int]]:
    """Yields a function that returns the number of the signal that arrived, 0 for none. The same signal a second time
    raises Interrupted at once.

    Nothing changes in a thread, where Python allows no handlers, and for a signal that is ignored.
    """
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number in arrived:
            raise Interrupted(number)
        arrived.append(number)
        log.warn("stopping after this step, with a checkpoint; the same signal again stops at once")

    in_main_thread = threading.current_thread() is threading.main_thread()
    watched = [s for s in _SIGNALS if in_main_thread and signal.getsignal(s) is not signal.SIG_IGN]
    before = [signal.signal(s, note) for s in watched]
    try:
        yield lambda: arrived[0] if arrived else 0
    finally:
        for number, handler in zip(watched, before, strict=True):
            signal.signal(number, handler)
