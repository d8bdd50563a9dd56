"""What is done with the shards of a run: each comes in as a lease, goes through an engine and comes back as files.

A work travels to other processes (pickle), so it holds no open file, no engine and no prompts. What it needs of rewards
is loaded again where it arrives, and refused if it is not the same.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from prefpipe import rewards
from prefpipe.config.rewards import Settings
from prefpipe.engines.base import Engine, ScoreRequest
from prefpipe.errors import IdentityError
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.sampling import Draws, Encode, SampledShard, sample_shards
from prefpipe.inference.scoring import Values, completion_of, key_of, score_shards, shard_of
from prefpipe.log import Advance
from prefpipe.models.chat import Chat
from prefpipe.rewards.base import RewardFunction
from prefpipe.runs import commits
from prefpipe.runs.store import Run
from prefpipe.runs.tables import Encoded, encoded
from prefpipe.schemas import Prompt, to_table

Content = TypeVar("Content")
R = TypeVar("R")


@dataclass(frozen=True)
class Lease(Generic[Content]):
    """A shard for one worker.

    suspects: keys of its requests that were in an engine when it died: they run first, one at a time
    killers: keys of requests, of any shard, that never run again
    """

    index: int
    content: Content
    suspects: frozenset[str] = frozenset()
    killers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A shard of one dataset as it is written; `rows` are the digests for its commit record."""

    dataset: str
    row_type: type
    file: Encoded
    rows: Mapping[str, str]


@dataclass(frozen=True)
class Finished:
    """A whole shard: its parts in the order in which they are written; `count` says how much work it was: sampled
    tokens, or scored completions."""

    index: int
    parts: Sequence[Part]
    count: int


class Work(Protocol):
    """What is done with every shard."""

    def keys(self, lease: Lease[Any]) -> list[str]:
        """The keys of its requests in the record of what is in the engine (see `inflight`)."""
        ...

    def run(
        self, leases: Iterator[Lease[Any]], engine: Engine, inflight: Inflight, advance: Advance, last_suspect: int
    ) -> Iterator[Finished]:
        """Every shard when it is whole. Leases are read one by one, as the engine takes requests; those up to
        `last_suspect` at once (-1 for none)."""
        ...


def part_of(dataset: str, row_type: type[R], rows: list[R], digests: Mapping[str, str]) -> Part:
    """A part from its rows. Raises DataError for values that do not fit."""
    return Part(dataset, row_type, encoded(row_type, to_table(row_type, rows), dataset), digests)


def write(run: Run, shards: Sequence[Finished]) -> int:
    """Commit whole shards. Returns how much work they were."""
    parts = ((shard.index, part) for shard in shards for part in shard.parts)
    commits.commit(run.new_part(one.dataset, one.row_type, index, one.file, one.rows) for index, one in parts)
    return sum(shard.count for shard in shards)


@dataclass(frozen=True)
class Sampling:
    """Prompts to samples: the content of a lease is a list of prompts.

    encoder: from the ids of prompts that never run again to the function that tokenises
    finish: from a sampled shard to its parts; the engine still runs
    """

    encoder: Callable[[Collection[str]], Encode]
    draws: Draws
    finish: Callable[[SampledShard, Engine], list[Part]]
    chat: Chat

    def keys(self, lease: Lease[Sequence[Prompt]]) -> list[str]:
        """The ids of the prompts."""
        return [prompt.prompt_id for prompt in lease.content]

    def run(
        self,
        leases: Iterator[Lease[Sequence[Prompt]]],
        engine: Engine,
        inflight: Inflight,
        advance: Advance,
        last_suspect: int,
    ) -> Iterator[Finished]:
        """Sample every shard."""
        killers = set[str]()
        encode = self.encoder(killers)
        shards = ((lease.index, lease.content) for lease in _noting(leases, killers))
        found = sample_shards(shards, encode, self.draws, engine, self.chat, inflight, advance, last_suspect)
        for shard in found:
            tokens = sum(len(s.token_ids) for prompt in shard.sampled for s in prompt.samples)
            yield Finished(shard.index, self.finish(shard, engine), tokens)


@dataclass(frozen=True)
class Scoring(Generic[Content]):
    """Completions to log-probs.

    without: the content of a lease without some completions, by their ids
    requests: what is to be scored of it
    finish: from (index, content, log-probs, name of the scorer) to the parts of a shard
    adapter: whether the adapter of the policy is on
    """

    without: Callable[[Content, Collection[str]], Content]
    requests: Callable[[Content], Sequence[ScoreRequest]]
    finish: Callable[[int, Content, Values, str], list[Part]]
    adapter: bool = True

    def keys(self, lease: Lease[Content]) -> list[str]:
        """INDEX/completion_id of the completions."""
        return [key_of(lease.index, request.completion_id) for request in self.requests(lease.content)]

    def run(
        self, leases: Iterator[Lease[Content]], engine: Engine, inflight: Inflight, advance: Advance, last_suspect: int
    ) -> Iterator[Finished]:
        """Score every shard."""

        def shards() -> Iterator[Any]:
            for lease in leases:
                content = self.without(lease.content, frozenset(map(completion_of, lease.killers)))
                yield shard_of(lease.index, (lease.index, content), self.requests(content))

        found = score_shards(shards(), engine, inflight, advance, adapter=self.adapter, last_suspect=last_suspect)
        for (index, content), values in found:
            yield Finished(index, self.finish(index, content, values, engine.scorer), len(values))


@dataclass(frozen=True)
class Rating(Generic[Content]):
    """Answers to rewards, without an engine of a policy."""

    finish: Callable[[int, Content, Values, str], list[Part]]

    def keys(self, lease: Lease[Content]) -> list[str]:  # noqa: ARG002  (no request enters an engine)
        """None: no engine of a policy can die."""
        return []

    def run(
        self,
        leases: Iterator[Lease[Content]],
        engine: Engine,  # noqa: ARG002
        inflight: Inflight,  # noqa: ARG002
        advance: Advance,  # noqa: ARG002
        last_suspect: int,  # noqa: ARG002
    ) -> Iterator[Finished]:
        """Rate every shard."""
        for lease in leases:
            yield Finished(lease.index, self.finish(lease.index, lease.content, {}, ""), 0)


@dataclass(frozen=True)
class Rewards:
    """Reward functions by name, with the settings that they are loaded from. On its way to another process it becomes
    their names, and they are loaded there: once for all works that a process gets."""

    functions: Mapping[str, RewardFunction]
    tables: Mapping[str, Settings] = field(default_factory=dict[str, Settings])

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, ({name: rewards.identity(name, self.tables) for name in self.functions}, dict(self.tables))


_here: dict[str, RewardFunction] = {}


def _loaded(identities: Mapping[str, str], tables: Mapping[str, Settings]) -> Rewards:
    """Rewards by name. Raises IdentityError for one that is another one here."""
    for name, identity in identities.items():
        if name not in _here:
            _here[name] = rewards.load(name, tables)
        if (found := rewards.identity(name, tables)) != identity:
            raise IdentityError(
                f"reward {name} is another one where a worker runs ({found}; {identity} where the command runs)",
                "install the same files and packages on every machine",
            )
    return Rewards({name: _here[name] for name in identities}, tables)


def _noting(leases: Iterable[Lease[Content]], killers: set[str]) -> Iterator[Lease[Content]]:
    for lease in leases:
        killers.update(lease.killers)
        yield lease
