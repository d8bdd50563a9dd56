"""The process of a worker: an engine, and shards that the driver of the run sends.

    python -m prefpipe.inference.pool_worker SOCKET PARENT

The driver starts it (see pool_processes), in a session of its own: whatever the worker starts is in its process group,
which ends with it. It ends when the driver does, however that ends.
"""

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from prefpipe import engines, processes
from prefpipe.engines.base import Engine
from prefpipe.errors import IdentityError, MissingInputError, PrefpipeError, StorageError
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.pool_messages import (
    Done,
    Drained,
    Event,
    Failed,
    Hello,
    Noted,
    Ready,
    Stop,
    Take,
    Taken,
    Took,
    Up,
    versions,
)
from prefpipe.inference.works import Lease, Work
from prefpipe.models.policy import Policy, resolve

Inbox = queue.SimpleQueue[Any]


class Voice:
    """What a worker says to the driver. Each message costs both of them a system call or two: that a request has left
    the engine is said with the progress that this is, which is reported at once."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self.say = send
        self._left: list[str] = []

    def note(self, line: str) -> None:
        """A line for the record. The driver has that of a request that enters the engine before the engine has it."""
        self._left.append(line)
        if not line.startswith("done "):
            self.advance(0)

    def advance(self, amount: float, note: str = "") -> None:  # noqa: ARG002  (the driver shows what it knows)
        """See `log.Advance`."""
        lines, self._left = tuple(self._left), []
        if lines or amount:
            self.say(Noted(lines, amount))


def main() -> None:
    """Serve the driver until it says stop, or is gone."""
    socket, parent = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes.death_with_parent(signal.SIGKILL, parent)()
    connection = Connection(socket)
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    voice = Voice(lambda event: connection.send_bytes(pickle.dumps(event)))
    voice.say(Up())
    try:
        _serve(voice, inbox)
    except Exception as error:
        voice.say(_failed(error))
    processes.end()


def _read(connection: Connection, inbox: Inbox) -> None:
    """Messages are taken off the socket at once: the driver never waits for an engine. Its end is the end of this
    process and of all that it started, in the middle of whatever they do."""
    try:
        while True:
            message = connection.recv()
            if isinstance(message, Stop):
                processes.leave_garbage()
            inbox.put(message)
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)


def _serve(voice: Voice, inbox: Inbox) -> None:
    hello = _opened(inbox.get())
    with _engine(hello) as (engine, identity):
        voice.say(Ready(identity))
        work: Work | None = None
        while not isinstance(message := inbox.get(), Stop):
            if isinstance(message, bytes):
                work = _opened(message)
            elif isinstance(message, Lease):
                assert work is not None
                _run(voice, inbox, work, message, engine)
            elif isinstance(message, Take):
                voice.say(Taken(engine.take(_here(message.policy))))


@contextlib.contextmanager
def _engine(hello: Hello) -> Generator[tuple[Any, dict[str, str]]]:
    """(engine, what must be equal in every worker). The files of the policy are read and digested here."""
    if hello.settings is None:
        yield None, versions()
        return
    engines.ENGINES[hello.engine] = hello.entry
    with engines.load(hello.engine, replace(hello.settings, policy=_here(hello.settings.policy))) as engine:
        yield engine, versions() | {"scorer": engine.scorer}


def _here(asked: Policy) -> Policy:
    """The policy as the files of this machine have it. Raises IdentityError where they are others."""
    policy = resolve(str(asked.directory), str(asked.adapter) if asked.adapter else "none")
    if policy.id != asked.id:
        raise IdentityError(
            f"{asked.directory} is another model where a worker runs ({policy.id}; {asked.id} where the command runs)",
            "give every machine the same files at the same path",
        )
    return policy


def _run(voice: Voice, inbox: Inbox, work: Work, first: Lease[Any], engine: Engine) -> None:
    """Shards through the engine, from the first one to the next `Drain`."""

    def leases() -> Iterator[Lease[Any]]:
        message: Any = first
        while isinstance(message, Lease):
            voice.say(Took())
            yield message
            message = inbox.get()
        if isinstance(message, Stop):  # for the one that reads after this batch
            inbox.put(message)

    inflight = Inflight.relayed(voice.note, first.suspects)
    last_suspect = first.index if first.suspects else -1
    for shard in work.run(leases(), engine, inflight, voice.advance, last_suspect):
        voice.say(Done(shard))
    voice.say(Drained())


def _opened(message: bytes) -> Any:
    return pickle.loads(message)  # noqa: S301  (from the process that started this one, over a socket of the two)


def _failed(error: Exception) -> Failed:
    """An error for the driver to raise."""
    if isinstance(error, PrefpipeError):
        return Failed(type(error), error.message, error.hint)
    if isinstance(error, ModuleNotFoundError):
        hint = "install the same extras of prefpipe on every machine"
        return Failed(MissingInputError, f"a worker needs the package '{error.name}'", hint)
    if isinstance(error, OSError):
        return Failed(StorageError, f"a worker: {error}", "check permissions and the disk, then run it again")
    return Failed(
        PrefpipeError,
        f"unexpected {type(error).__name__} in a worker: {error}",
        "run again with --workers 1 and --verbose, and report the traceback",
    )


if __name__ == "__main__":
    main()
