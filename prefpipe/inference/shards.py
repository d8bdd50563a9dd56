"""Shards of requests through an engine: no pause between two shards, and each comes back when it is whole.

    shards:   0 [a b]  1 [c d]  2 [e f] ...       read one by one, as the engine takes their requests
    engine:   a b c | d e | f ...                 works on several requests, of one shard or of two
    back:     0 {a: .., b: ..}, 1 {c: .., d: ..}  in the order in which they become whole

Requests that were in the engine when it died (see inflight) run first, each alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, TypeVar

from prefpipe.errors import PrefpipeError
from prefpipe.inference.inflight import Inflight
from prefpipe.log import Advance

Content = TypeVar("Content")
Request = TypeVar("Request")
Result = TypeVar("Result")
Ask = Callable[[Iterator[Request]], Iterator[tuple[str, Result]]]  # (key, answer) in the order of completion


@dataclass(frozen=True)
class Shard(Generic[Content, Request]):
    """Requests whose answers are committed together.

    index: the number of the shard; shards come with rising numbers
    content: returned together with the answers
    requests: by their key in inflight.log, which is unique in the run
    """

    index: int
    content: Content
    requests: Mapping[str, Request]


@dataclass
class _Open(Generic[Content, Result]):
    """A shard under way: the answers so far, and how many are missing."""

    content: Content
    lacking: int
    answers: dict[str, Result] = field(default_factory=dict[str, Result])


@dataclass
class _Table(Generic[Content, Request, Result]):
    """All shards under way, by the requests without an answer, and the whole shards."""

    open_of: dict[str, _Open[Content, Result]] = field(default_factory=dict[str, _Open[Content, Result]])
    whole: list[_Open[Content, Result]] = field(default_factory=list[_Open[Content, Result]])

    def open(self, shards: Iterable[Shard[Content, Request]]) -> Iterator[tuple[str, Request]]:
        """The (key, request) of every shard. A shard is read when its first request is asked for."""
        for shard in shards:
            entry = _Open[Content, Result](shard.content, len(shard.requests))
            self.open_of.update(dict.fromkeys(shard.requests, entry))
            if not shard.requests:
                self.whole.append(entry)
            yield from shard.requests.items()

    def put(self, key: str, answer: Result) -> None:
        """Add the answer to a request."""
        entry = self.open_of.pop(key)
        entry.answers[key] = answer
        entry.lacking -= 1
        if not entry.lacking:
            self.whole.append(entry)

    def take_whole(self) -> Iterator[tuple[Content, dict[str, Result]]]:
        """Remove and return the shards that are whole."""
        while self.whole:
            entry = self.whole.pop(0)
            yield entry.content, entry.answers


def through_engine(
    shards: Iterable[Shard[Content, Request]],
    ask: Ask[Request, Result],
    inflight: Inflight,
    advance: Advance,
    *,
    last_suspect: int,
    things: str,
) -> Iterator[tuple[Content, dict[str, Result]]]:
    """Ask an engine for all requests: (content, answers by key) of every shard, as soon as it is whole.

    `last_suspect` is the index of the last shard that holds a suspect of `inflight`, -1 if none does. Shards up to it
    are read at once, so that suspects can run before the others. `things` names several requests in messages. Raises
    PrefpipeError when the engine fails, or ends without an answer to a request.
    """
    source = iter(shards)
    table = _Table[Content, Request, Result]()
    early = list(table.open(_up_to(source, last_suspect)))
    suspects = frozenset(inflight.suspects)
    alone = [([item], True) for item in early if item[0] in suspects]
    others = chain((item for item in early if item[0] not in suspects), table.open(source))
    for requests, is_alone in (*alone, (others, False)):
        entering = inflight.entering(requests, alone=is_alone)
        for key, answer in inflight.watch(ask(entering), things):
            inflight.done(key)
            table.put(key, answer)
            advance(1)
            yield from table.take_whole()
    yield from table.take_whole()
    if table.open_of:
        raise PrefpipeError(
            f"the engine ended without an answer for {len(table.open_of)} {things}",
            "run the same command again; if it happens again, report it with the version of the engine",
        )


def _up_to(source: Iterator[Shard[Content, Request]], last: int) -> Iterator[Shard[Content, Request]]:
    """The shards of the source up to number `last`, which were under way when the engine died."""
    if last < 0:
        return
    for shard in source:
        yield shard
        if shard.index >= last:
            return
