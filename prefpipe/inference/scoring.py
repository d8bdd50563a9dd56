"""Completions to an engine, and their log-probs back, shard by shard. None of them can kill a run for ever."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from prefpipe import log
from prefpipe.engines import base
from prefpipe.engines.base import Engine
from prefpipe.errors import PrefpipeError
from prefpipe.inference.inflight import Inflight

Shard = tuple[int, Sequence[base.ScoreRequest]]
Scored = tuple[int, dict[str, list[float]]]  # number of a shard, log-probs (nats) of every token by completion_id


def score_shards(
    shards: Iterable[Shard], engine: Engine, inflight: Inflight, expected: float | None
) -> Iterator[Scored]:
    """Score (number, sequences) shards without a pause between them; each comes back when it is whole.

    Shards are taken in their order, as the engine needs them. Sequences under suspicion of having killed the engine run
    first, one at a time. `expected` is how many there are, where that is known. Raises PrefpipeError when the engine
    fails, or leaves a sequence without values.
    """
    source = iter(shards)
    table = _Table()
    suspects = frozenset(inflight.suspects)
    held = [s for index, given in _up_to(source, suspects) for s in table.open(index, given)]
    alone = [s for s in held if s.completion_id in suspects]
    rest = chain(
        (s for s in held if s.completion_id not in suspects),
        (s for index, given in source for s in table.open(index, given)),
    )
    with log.progress("scoring", expected, "rows") as advance:
        for given, is_alone in [*(([s], True) for s in alone), (rest, False)]:
            entering = inflight.entering(given, lambda sequence: sequence.completion_id, alone=is_alone)
            for key, values in inflight.watch(engine.score(entering, adapter=True), "completions"):
                inflight.done(key)
                table.put(key, values)
                advance(1)
                yield from table.whole()
    yield from table.whole()
    if table.left:
        raise PrefpipeError(
            f"the engine gave no log-probs for {sum(table.left.values())} completions",
            "run the same command again; if it happens again, report it with the version of the engine",
        )


def killers(inflight: Inflight) -> frozenset[str]:
    """The completion_ids that killed the engine twice."""
    return frozenset(_place(key)[1] for key in inflight.killers)


@dataclass
class _Table:
    """Shards under way: how many sequences of each are left, and the values that are there."""

    left: dict[int, int] = field(default_factory=dict)
    values: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    def open(self, index: int, given: Sequence[base.ScoreRequest]) -> list[base.ScoreRequest]:
        """A shard begins; its sequences under keys of the run, since two shards may hold the same one."""
        self.left[index] = len(given)
        self.values[index] = {}
        return [replace(s, completion_id=f"{index}/{s.completion_id}") for s in given]

    def put(self, key: str, values: list[float]) -> None:
        """The values of a sequence."""
        index, name = _place(key)
        self.values[index][name] = values
        self.left[index] -= 1

    def whole(self) -> Iterator[Scored]:
        """The shards that have all their values; they leave the table."""
        for index in [i for i, count in self.left.items() if not count]:
            del self.left[index]
            yield index, self.values.pop(index)


def _up_to(source: Iterator[Shard], suspects: frozenset[str]) -> Iterator[Shard]:
    """The shards that hold a suspect, and those before them: these were under way as well when the engine died."""
    last = max((_place(key)[0] for key in suspects), default=-1)
    if last < 0:
        return
    for index, given in source:
        yield index, given
        if index >= last:
            return


def _place(key: str) -> tuple[int, str]:
    """(number of the shard, completion_id) of a key."""
    index, _, name = key.partition("/")
    return int(index), name
