"""What the engine was working on when it died: the record that finds the one thing that kills it.

OUT/inflight.log has a line when something (the key of a prompt to sample, or of a completion to score) enters the
engine, when it leaves it, and when an attempt ends. What was inside when an attempt ended without a word is under
suspicion and runs alone the next time. Alone, an engine that fails convicts it at once; a process that vanishes (which
may have been anybody's kill -9) convicts it the second time.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
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
# What the end of an attempt says against a key that was alone in the engine. A new start without an end before it:
# the process was gone in between.
_ENDS = {"stopped": 0, "start": 1, "died": _CONVICTED}


@dataclass
class Inflight:
    """Earlier attempts as they stand in the log, and the present one. `killers` never run again in this directory."""

    path: Path
    suspects: list[str]
    killers: list[str]
    open: dict[str, None] = field(default_factory=dict)
    _log: Appender | None = None

    @classmethod
    def load(cls, out: Path) -> "Inflight":
        """What earlier attempts left behind."""
        path = out / _NAME
        deaths, alone = _read(path)
        killers = [i for i, count in alone.items() if count >= _CONVICTED]
        return cls(path, [i for i in deaths if i not in killers], killers)

    @contextmanager
    def recording(self) -> Generator[None]:
        """Record an attempt; any end but the death of the process or of the engine clears what is inside."""
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
        """A prompt or completion enters the engine."""
        self.open[key] = None
        self._write(f"{'alone' if alone else 'take'} {key}")

    def done(self, key: str) -> None:
        """It leaves the engine."""
        self.open.pop(key, None)
        self._write(f"done {key}")

    def entering(self, things: Iterable[T], key: Callable[[T], str], *, alone: bool) -> Iterator[T]:
        """What an engine is given, on record as it is taken."""
        for thing in things:
            self.take(key(thing), alone=alone)
            yield thing

    def died(self) -> None:
        """The engine failed with what is inside."""
        self._write("died")

    def watch(self, results: Iterator[T], things: str) -> Iterator[T]:
        """What an engine yields. Raises PrefpipeError, and records it, when the engine fails; our own errors pass.

        `things` says for the message what the engine works on: prompts, completions.
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
                    f"the engine died while it worked on {len(self.open)} {things}: {type(error).__name__}: {error}",
                    f"run the same command again: these {things} run first, one at a time, and one that kills the "
                    "engine again goes to dropped.parquet",
                ) from error
            yield result

    def close(self) -> None:
        """The run is whole: only the killers are kept, for the day a shard must be made again."""
        if self.killers:
            fsio.write_text(self.path, "".join(f"killer {i}\n" for i in self.killers))
        else:
            fsio.remove(self.path)

    def _write(self, line: str) -> None:
        assert self._log is not None
        self._log(line)


def _read(path: Path) -> tuple[dict[str, None], Counter[str]]:
    """(what was inside at a bad end, how heavily each is charged); a torn last line is ignored."""
    inside: dict[str, bool] = {}
    suspects: dict[str, None] = {}
    charges: Counter[str] = Counter()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for line in [*lines, "start"]:
        word, _, key = line.partition(" ")
        if word in ("take", "alone"):
            inside[key] = word == "alone"
        elif word == "done":
            inside.pop(key, None)
        elif word == "killer":
            charges[key] = _CONVICTED
        elif word in _ENDS:
            weight = _ENDS[word]
            suspects |= dict.fromkeys(inside) if weight else {}
            charges.update({i: weight for i, alone in inside.items() if alone})
            inside.clear()
    return suspects, charges
