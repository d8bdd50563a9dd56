"""Workers as processes of this machine, each in a session of its own, over a socket that the two share."""

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from prefpipe import clock, processes
from prefpipe.inference.pool_messages import Event, Gone, Stop

_GRACE_S = 30.0  # to free an engine


@dataclass
class _Worker:
    process: "subprocess.Popen[bytes]"
    connection: Connection
    handle: int  # a pidfd: ready when the process has ended, whoever holds its socket

    def __post_init__(self) -> None:
        self._words = select.poll()
        self._words.register(self.connection, select.POLLIN)

    def has_words(self) -> bool:
        """Whether it has said something that nobody read."""
        return bool(self._words.poll(0))

    def has_ended(self, timeout: float) -> bool:
        """Whether its process has ended; at most `timeout` seconds are waited for it. An actor of Ray asks in two
        threads, which one poll object does not allow."""
        end = select.poll()
        end.register(self.handle, select.POLLIN)
        return bool(end.poll(1000 * timeout))


class Processes:
    """Processes by number; number n gets environment n."""

    start_s = 300.0  # on a busy machine an interpreter with its imports takes a while

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self._environments = environments
        self._workers: dict[int, _Worker] = {}
        self._numbers: dict[int, int] = {}  # of workers, by the descriptors that `_poll` watches
        self._poll = select.poll()  # one for all messages: to set it up costs more than to read a message

    def start(self, number: int) -> None:
        """Start a worker; one of the same number must be gone."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                processes.python("prefpipe.inference.pool_worker", str(theirs.fileno()), str(os.getpid())),
                env={**processes.environment(), **self._environments[number]},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the driver, which ends its workers
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout of the command is for data
            )
        worker = _Worker(process, Connection(ours.detach()), os.pidfd_open(process.pid))
        self._workers[number] = worker
        for source in (worker.connection.fileno(), worker.handle):
            self._numbers[source] = number
            self._poll.register(source, select.POLLIN)

    def send(self, number: int, message: Any) -> None:
        """Send a message. One to a worker that is gone is lost: `wait` says so."""
        with contextlib.suppress(OSError):
            self._workers[number].connection.send(message)

    def wait(self, timeout: float) -> list[tuple[int, Event]]:
        """What workers have said, in their order; at most `timeout` seconds are waited for the first word."""
        ready = sorted({self._numbers[source] for source, _ in self._poll.poll(1000 * timeout)})
        return [(number, event) for number in ready for event in self._said(number)]

    def stop(self, number: int) -> None:
        """End a worker and everything that it started, at once."""
        worker = self._workers.pop(number)
        for source in (worker.connection.fileno(), worker.handle):
            del self._numbers[source]
            self._poll.unregister(source)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        worker.connection.close()
        os.close(worker.handle)

    def close(self, *, gently: bool) -> None:
        """End all workers; gently, they may free their engines first."""
        if gently:
            for number in self._workers:
                self.send(number, Stop())
            deadline = clock.monotonic() + _GRACE_S
            for worker in self._workers.values():
                worker.has_ended(max(0.0, deadline - clock.monotonic()))
        for number in list(self._workers):
            self.stop(number)

    def _said(self, number: int) -> list[Event]:
        """All that a worker has said and nobody read, and that it is gone, if it is."""
        worker = self._workers[number]
        ended = worker.has_ended(0)
        events: list[Event] = []
        try:
            while worker.has_words():
                events.append(worker.connection.recv())
        except (EOFError, OSError):  # it has ended, or will in a moment
            ended = worker.has_ended(_GRACE_S) or ended
        if ended:
            self.stop(number)
            code = worker.process.returncode
            events.append(Gone(f"exit code {code}" if code >= 0 else signal.Signals(-code).name))
        return events
