"""Which prompts the engine was working on when it died: the record that finds the one prompt that kills it.

OUT/inflight.log has a line when a prompt enters the engine, when it leaves it, and when an attempt ends. A prompt that
was inside when an attempt ended without a word is under suspicion and runs alone the next time. Alone, an engine that
fails convicts it at once; a process that vanishes (which may have been anybody's kill -9) convicts it the second time.
"""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prefpipe import fsio
from prefpipe.fsio import Appender

_NAME = "inflight.log"
_CONVICTED = 2
# What the end of an attempt says against a prompt that was alone in the engine. A new start without an end before it:
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
        """Record an attempt; any end but the death of the process or of the engine clears the prompts inside."""
        with fsio.appender(self.path) as log:
            self._log = log
            log("start")
            try:
                yield
            except BaseException:
                log("stopped")
                raise
            log("stopped")

    def take(self, prompt_id: str, *, alone: bool) -> None:
        """A prompt enters the engine."""
        self.open[prompt_id] = None
        self._write(f"{'alone' if alone else 'take'} {prompt_id}")

    def done(self, prompt_id: str) -> None:
        """A prompt leaves the engine."""
        self.open.pop(prompt_id, None)
        self._write(f"done {prompt_id}")

    def died(self) -> None:
        """The engine failed with these prompts inside."""
        self._write("died")

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
    """(prompts that were inside at a bad end, how heavily each is charged); a torn last line is ignored."""
    inside: dict[str, bool] = {}
    suspects: dict[str, None] = {}
    charges: Counter[str] = Counter()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for line in [*lines, "start"]:
        word, _, prompt_id = line.partition(" ")
        if word in ("take", "alone"):
            inside[prompt_id] = word == "alone"
        elif word == "done":
            inside.pop(prompt_id, None)
        elif word == "killer":
            charges[prompt_id] = _CONVICTED
        elif word in _ENDS:
            weight = _ENDS[word]
            suspects |= dict.fromkeys(inside) if weight else {}
            charges.update({i: weight for i, alone in inside.items() if alone})
            inside.clear()
    return suspects, charges
