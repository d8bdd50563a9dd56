"""The record of requests that were in the engine when it died, to find the single request that kills it.

OUT/inflight.log has a line when a request enters the engine, when it leaves the engine, and when an attempt starts or
ends. A request is named by its key: that of a prompt to sample, or of a completion to score. Requests that were inside
when the process or the engine died are suspects, and run alone in the next attempt. An engine that fails on a single
suspect convicts it at once. A process that vanishes, perhaps by a kill -9 of somebody, convicts it the second time.

With several workers (see pool) the driver writes the log: a worker sends its lines, and the driver adds a line for each
request that was inside a worker that died.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from prefpipe.errors import PrefpipeError
from prefpipe.runs import fsio
from prefpipe.runs.fsio import Appender

T = TypeVar("T")
_NAME = "inflight.log"
_CONVICTED = 2
# Charges against a request that ran alone, by the end of the attempt. At a start without an end before it the process
# had vanished.
_ENDS = {"stopped": 0, "start": 1, "died": _CONVICTED}
# Charges against a request inside a worker that ended while the driver went on.
_LOST = {"vanished": 1, "failed": _CONVICTED}


@dataclass
class Inflight:
    """The earlier attempts in the log, and the present attempt.

    suspects: keys of requests that were inside at a death, in the order in which they entered
    killers: keys of convicted requests; they never run again in this directory
    inside: keys of the requests in the engine now, and whether each is alone
    """

    path: Path
    suspects: list[str]
    killers: list[str]
    inside: dict[str, bool] = field(default_factory=dict)
    _log: Appender | None = None
    _charges: Counter[str] = field(default_factory=Counter[str])

    @classmethod
    def load(cls, out: Path) -> "Inflight":
        """The record of a run directory, from its log of earlier attempts."""
        path = out / _NAME
        suspects, charges = _read(path)
        killers = [key for key, count in charges.items() if count >= _CONVICTED]
        return cls(path, [key for key in suspects if key not in killers], killers, _charges=charges)

    @classmethod
    def relayed(cls, log: Appender, suspects: Iterable[str]) -> "Inflight":
        """The record of a worker. It sends its lines to the driver, which knows the earlier attempts."""
        return cls(Path(_NAME), list(suspects), [], _log=log)

    @contextmanager
    def recording(self) -> Generator[None]:
        """Record an attempt. Any end except the death of the process or of the engine clears the requests inside."""
        with fsio.appender(self.path) as log:
            self._log = log
            log("start")
            try:
                yield
            except BaseException:
                log("stopped")
                raise
            log("stopped")

    def take(self, key: str, *, alone: bool) -> None:
        """Record that a request enters the engine."""
        self.inside[key] = alone
        self._write(f"{'alone' if alone else 'take'} {key}")

    def done(self, key: str) -> None:
        """Record that a request leaves the engine."""
        self.inside.pop(key, None)
        self._write(f"done {key}")

    def lost(self, keys: Iterable[str], how: str) -> list[str]:
        """Record that requests were inside a worker that ended: the worker `vanished`, or its engine `failed`. Returns
        the requests that are convicted by it."""
        convicted: list[str] = []
        for key in keys:
            self._write(f"{how} {key}")
            self._charges[key] += _LOST[how] * self.inside.pop(key)
            if self._charges[key] >= _CONVICTED:
                convicted.append(key)
            elif key not in self.suspects:
                self.suspects.append(key)
        self.killers += convicted
        self.suspects = [key for key in self.suspects if key not in convicted]
        return convicted

    def entering(self, requests: Iterable[tuple[str, T]], *, alone: bool) -> Iterator[T]:
        """The requests of (key, request); each is recorded when the engine takes it. An exception of the iterator that
        reads them is not a death of the engine: it is raised as PrefpipeError."""
        source = iter(requests)
        while True:
            try:
                key, request = next(source)
            except StopIteration:
                return
            except PrefpipeError:
                raise
            except Exception as error:
                raise PrefpipeError(
                    f"the next rows cannot be read: {type(error).__name__}: {error}",
                    "check the input; if it is sound, report this with --verbose",
                ) from error
            self.take(key, alone=alone)
            yield request

    def died(self) -> None:
        """Record that the engine failed while it worked on the requests inside."""
        self._write("died")

    def watch(self, results: Iterator[T], things: str) -> Iterator[T]:
        """The results of an engine. An exception of the engine is recorded as its death and raised as PrefpipeError; a
        PrefpipeError passes.

        `things` names several requests in messages: prompts, completions.
        """
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except PrefpipeError:
                raise
            except Exception as error:
                self.died()
                raise PrefpipeError(
                    f"the engine died while it worked on {len(self.inside)} {things}: {type(error).__name__}: {error}",
                    f"run the same command again: these {things} run first, one at a time, and one that kills the "
                    "engine again goes to dropped.parquet",
                ) from error
            yield result

    def close(self) -> None:
        """Reduce the log to the killers, once the run is whole: a shard may have to be made again later."""
        if self.killers:
            fsio.write_text(self.path, "".join(f"killer {key}\n" for key in self.killers))
        else:
            fsio.remove(self.path)

    def _write(self, line: str) -> None:
        assert self._log is not None
        self._log(line)


def _read(path: Path) -> tuple[dict[str, None], Counter[str]]:
    """The keys inside at a death, and the charges by key. A torn last line is ignored."""
    inside: dict[str, bool] = {}  # key -> whether the request was alone
    suspects: dict[str, None] = {}
    charges: Counter[str] = Counter()
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    for line in [*lines, "start"]:
        word, _, key = line.partition(" ")
        if word in ("take", "alone"):
            inside[key] = word == "alone"
        elif word == "done":
            inside.pop(key, None)
        elif word in _LOST and key in inside:
            suspects[key] = None
            charges[key] += _LOST[word] * inside.pop(key)
        elif word == "killer":
            charges[key] = _CONVICTED
        elif word in _ENDS:
            if _ENDS[word]:
                suspects |= dict.fromkeys(inside)
            charges.update({key: _ENDS[word] for key, alone in inside.items() if alone})
            inside.clear()
    return suspects, charges
