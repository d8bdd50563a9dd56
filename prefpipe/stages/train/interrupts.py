"""SIGTERM and SIGINT while training: noted now, acted on when the step is done and its checkpoint is safe."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from prefpipe import log
from prefpipe.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def noted() -> Generator[Callable[[], int]]:
    """A function that says which signal has come (0 for none); the same signal a second time interrupts at once.

    In a thread, where Python allows no handlers, and for a signal that is ignored, nothing changes.
    """
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number in came:
            raise Interrupted(number)
        came.append(number)
        log.warn("stopping after this step, with a checkpoint; the same signal again stops at once")

    ours = threading.current_thread() is threading.main_thread()
    watched = [s for s in _SIGNALS if ours and signal.getsignal(s) is not signal.SIG_IGN]
    before = [signal.signal(s, note) for s in watched]
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in zip(watched, before, strict=True):
            signal.signal(number, handler)
