"""The driver's side of workers: who has which shard, and what becomes of the shards of one that dies.

A worker always has one shard more than its engine has begun with: the engine never runs dry. A worker that dies costs
the shards that it had, which go to others; another one starts in its place. What was in its engine is recorded (see
`inflight`).
"""

import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from prefpipe import clock, log
from prefpipe.errors import IdentityError, PrefpipeError
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.pool_leases import Queue, Worker, suspected
from prefpipe.inference.pool_messages import (
    Done,
    Drain,
    Drained,
    Event,
    Failed,
    Gone,
    Hello,
    Noted,
    Ready,
    Take,
    Taken,
    Took,
    Up,
    versions,
)
from prefpipe.inference.works import Finished, Work
from prefpipe.log import Advance
from prefpipe.models.policy import Policy

Shards = Iterator[tuple[int, Any]]  # (number, content) of every shard
_READY_S = 3600.0  # a model of hundreds of GB comes over the network
_TICK_S = 5.0
_TOGETHER = 16  # shards that are committed at once: more of them cost no less each


class Backend(Protocol):
    """Starts workers, by number, and carries messages."""

    start_s: float  # in which a worker must be up

    def start(self, number: int) -> None:
        """Start a worker; one of the same number must be gone."""
        ...

    def send(self, number: int, message: Any) -> None:
        """Send a message, without waiting for the worker."""
        ...

    def wait(self, timeout: float) -> list[tuple[int, Event]]:
        """What workers have said, waiting at most `timeout` seconds. After `Gone` a worker is no more."""
        ...

    def stop(self, number: int) -> None:
        """End a worker at once."""
        ...

    def close(self, *, gently: bool) -> None:
        """End all workers; gently, they may free their engines first."""
        ...


class Workers:
    """Workers of a backend. All must have equal identities (see `pool_messages.Ready`)."""

    def __init__(self, backend: Backend, hello: Hello, count: int) -> None:
        self._backend, self._hello = backend, hello
        self._identity: dict[str, str] = versions()
        self._work = b""
        self._deaths = 0  # since anything came out of an engine
        self._workers: dict[int, Worker] = {}
        for number in range(count):
            self._start(number)

    def run(
        self, work: Work, shards: Shards, inflight: Inflight, advance: Advance, last_suspect: int = -1
    ) -> Iterator[Sequence[Finished]]:
        """See `pool.Pool`."""
        self._work = pickle.dumps(work)
        for number, worker in self._workers.items():
            if worker.ready:
                self._backend.send(number, self._work)
        queue = Queue(deque(), shards, inflight)
        while last_suspect >= 0 and (lease := queue.take(alone=True)):
            queue.again.append(suspected(lease, work, inflight))
            last_suspect = -1 if lease.index >= last_suspect else last_suspect
        with inflight.recording():
            while queue or any(worker.leases for worker in self._workers.values()):
                self._assign(queue)
                heard = self._backend.wait(_TICK_S)
                yield from _together(self._heard(number, event, queue, work, advance) for number, event in heard)
                self._check_times()
            self._assign(queue)  # nothing is left: those that wait for a shard are told so

    def take(self, policy: Policy) -> bool:
        """See `warm.Warm`. False also when a worker has died since the last shard."""
        assert self._hello.settings is not None
        self._hello = replace(self._hello, settings=replace(self._hello.settings, policy=policy))
        asked = {number for number, worker in self._workers.items() if worker.up}  # the others are to hear of it
        for number in asked:
            self._backend.send(number, Take(policy))
        while asked:
            for number, event in self._backend.wait(_TICK_S):
                match event:
                    case Taken(taken=True):
                        asked.remove(number)
                    case Up() | Ready() | Drained():
                        self._starts(number, event)
                    case _:
                        return False
            self._check_times()
        return True

    def _start(self, number: int) -> None:
        self._workers[number] = Worker(clock.monotonic())
        self._backend.start(number)

    def _assign(self, queue: Queue) -> None:
        """Give every worker the next shard. One for which there is none is told so, once."""
        for number, worker in self._workers.items():
            if not worker.ready or worker.untaken or worker.drains:
                continue
            lease = queue.take(alone=not worker.batch)
            if lease is not None:
                worker.leases[lease.index] = lease
                worker.batch = worker.untaken = True
                self._backend.send(number, lease)
            if worker.batch and (lease is None or lease.suspects):
                worker.drains = True
                self._backend.send(number, Drain())

    def _heard(self, number: int, event: Event, queue: Queue, work: Work, advance: Advance) -> Finished | None:
        """What an event means; the shard that is whole by it."""
        worker = self._workers[number]
        match event:
            case Noted(lines, amount):
                for line in lines:
                    self._record(worker, line, queue.inflight)
                if amount:
                    worker.advanced += amount
                    advance(amount)
            case Took():
                worker.untaken = False
            case Done(shard):
                lease = worker.leases.pop(shard.index)
                worker.advanced = max(0.0, worker.advanced - len(work.keys(lease)))
                return shard
            case Gone():
                advance(-worker.advanced)
                self._gone(number, event, queue, work)
            case _:
                self._starts(number, event)
        return None

    def _starts(self, number: int, event: Event) -> None:
        """A worker comes up, waits for a shard, or fails."""
        worker = self._workers[number]
        match event:
            case Up():
                worker.up, worker.since = True, clock.monotonic()
                self._backend.send(number, pickle.dumps(self._hello))
            case Ready(identity):
                self._check(identity)
                worker.ready = True
                if self._work:
                    self._backend.send(number, self._work)
            case Drained():
                worker.batch = worker.drains = False
            case Failed(kind, message, hint):
                if not worker.engine_died:
                    raise kind(message, hint)
                log.warn(f"worker {number}: {message}")
            case _:
                raise AssertionError(event)

    def _record(self, worker: Worker, text: str, inflight: Inflight) -> None:
        """What entered and left the engine of a worker."""
        word, _, key = text.partition(" ")
        if word == "done":
            worker.inside.pop(key, None)
            inflight.done(key)
            self._deaths = 0
        elif word in ("take", "alone"):
            worker.inside[key] = None
            inflight.take(key, alone=word == "alone")
        else:
            worker.engine_died = True

    def _gone(self, number: int, end: Gone, queue: Queue, work: Work) -> None:
        """A worker has ended: its shards go to others, and another worker starts. Raises PrefpipeError when workers die
        and nothing comes out of any engine in between."""
        worker, inflight = self._workers[number], queue.inflight
        self._deaths += 1
        convicted: list[str] = []
        if end.blameless:
            for key in worker.inside:
                inflight.done(key)
        else:
            convicted = inflight.lost(worker.inside, "failed" if worker.engine_died else "vanished")
        for key in convicted:
            log.warn(f"{key} killed its worker when it ran alone: it is left out")
            self._deaths = 0
        for lease in worker.leases.values():
            queue.again.appendleft(suspected(lease, work, inflight))
        if self._deaths > len(self._workers) + 2 or not (worker.ready or end.blameless):
            raise PrefpipeError(
                f"worker {number} ended ({end.why}) "
                + (f"and {self._deaths - 1} before it did" if worker.ready else "before its engine ran"),
                "see what it said above; with --workers 1 the engine runs in the process of the command",
            )
        if not convicted:
            log.warn(f"worker {number} ended ({end.why}): {len(worker.leases)} shards go to others")
        self._start(number)

    def _check(self, identity: dict[str, str]) -> None:
        """Raise IdentityError for a worker that computes with something else than this process or the first worker."""
        for name, value in identity.items():
            expected = self._identity.setdefault(name, value)
            if value != expected:
                raise IdentityError(
                    f"a worker has {name} {value}, and {expected} is that of the others",
                    "install the same versions on every machine",
                )

    def _check_times(self) -> None:
        """Go on without a worker that does not come up, as when the place of its machine stays empty. Raises
        PrefpipeError when there is no other, and for an engine that does not start."""
        for number, worker in [item for item in self._workers.items() if not item[1].ready]:
            limit = _READY_S if worker.up else self._backend.start_s
            if clock.monotonic() - worker.since <= limit:
                continue
            what = "its engine does not run" if worker.up else "it does not start"
            if worker.up or not any(other.ready for other in self._workers.values()):
                hint = "ask for fewer workers, or see what they wait for"
                raise PrefpipeError(f"worker {number}: {what} after {limit:.0f} s", hint)
            log.warn(f"worker {number}: {what} after {limit:.0f} s: the others go on without it")
            self._backend.stop(number)
            del self._workers[number]


def _together(found: Iterable[Finished | None]) -> Iterator[list[Finished]]:
    """Whole shards, several at a time where there are several. Those before an error come before it."""
    whole: list[Finished] = []
    try:
        for shard in found:
            whole += [shard] if shard else []
            if len(whole) == _TOGETHER:
                yield whole
                whole = []
    except PrefpipeError:
        if whole:
            yield whole
        raise
    if whole:
        yield whole
