"""Workers as threads of the test: the code of a worker without a process, which dies where the test wants it to."""

import itertools
import pickle
import queue
import threading
from collections.abc import Callable
from typing import Any

from prefpipe.inference import pool_worker
from prefpipe.inference.pool_messages import Event, Gone, Stop, Up

Dies = Callable[[int, int], bool]  # (life of the worker, number of its message) -> whether it dies before saying it


def first_to_say(number: int, deaths: int = 1) -> Dies:
    """The first `deaths` lives that come to their message of this number die before it. Which ones they are is the
    luck of the threads: a worker may have no work left when it is ready."""
    turns = itertools.count()
    return lambda _life, count: count == number and next(turns) < deaths


class Killed(BaseException):
    """The end of a worker, wherever it is: nothing catches it."""


class _Line:
    """The end of a socket that a worker holds."""

    def __init__(self, say: Callable[[Event], None], dies: Callable[[int], bool]) -> None:
        self._say, self._dies, self._count = say, dies, 0

    def send(self, message: Event) -> None:
        self._count += 1
        if self._dies(self._count):
            raise Killed
        self._say(pickle.loads(pickle.dumps(message)))


class Threads:
    """A backend. `lives` counts the workers that were started, `blameless` says whether their ends are machines that
    went down."""

    start_s = 20.0

    def __init__(self, dies: Dies = lambda _life, _count: False, *, blameless: bool = False) -> None:
        self._dies, self._blameless = dies, blameless
        self._inboxes: dict[int, queue.SimpleQueue[Any]] = {}
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self.lives = 0
        self.threads: list[threading.Thread] = []

    def start(self, number: int) -> None:
        self.lives += 1
        life, inbox = self.lives, queue.SimpleQueue[Any]()
        self._inboxes[number] = inbox

        def serve() -> None:
            line = _Line(lambda event: self._events.put((number, event)), lambda count: self._dies(life, count))
            try:
                line.send(Up())
                pool_worker._serve(pool_worker.Voice(line.send), inbox)
            except Killed:
                self._events.put((number, Gone("SIGKILL", self._blameless)))
            except Exception as error:
                self._events.put((number, pool_worker._failed(error)))
                self._events.put((number, Gone("exit code 0")))

        self.threads.append(threading.Thread(target=serve, daemon=True))
        self.threads[-1].start()

    def send(self, number: int, message: Any) -> None:
        self._inboxes[number].put(message if isinstance(message, bytes) else pickle.loads(pickle.dumps(message)))

    def wait(self, timeout: float) -> list[tuple[int, Event]]:
        try:
            found = [self._events.get(timeout=timeout)]
        except queue.Empty:
            return []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def say(self, number: int, event: Event) -> None:
        """Let a worker say something."""
        self._events.put((number, event))

    def stop(self, number: int) -> None:
        self._inboxes.pop(number).put(Stop())

    def close(self, *, gently: bool) -> None:
        for number in list(self._inboxes):
            self.stop(number)
