"""Completions to an engine, and their log-probs back, shard by shard. A completion that crashes the engine twice is
dropped by the caller: `killers` are their ids."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from prefpipe.engines.base import Engine, ScoreRequest
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.shards import Shard, through_engine
from prefpipe.log import Advance
from prefpipe.schemas import Completion

Content = TypeVar("Content")
Values = dict[str, list[float]]  # log-probs (nats) of every token, by completion_id


def request_of(completion: Completion) -> ScoreRequest:
    """The request to score a completion."""
    return ScoreRequest(completion.completion_id, completion.prompt_token_ids, completion.token_ids)


def shard_of(index: int, content: Content, requests: Sequence[ScoreRequest]) -> Shard[Content, ScoreRequest]:
    """A shard of completions. The key of each is INDEX/completion_id: two shards may hold the same completion."""
    keyed = (replace(r, completion_id=f"{index}/{r.completion_id}") for r in requests)
    return Shard(index, content, {r.completion_id: r for r in keyed})


def score_shards(
    shards: Iterable[Shard[Content, ScoreRequest]],
    engine: Engine,
    inflight: Inflight,
    advance: Advance,
    *,
    adapter: bool = True,
) -> Iterator[tuple[Content, Values]]:
    """Score the completions of all shards; (content, log-probs) of every shard that is whole.

    Raises PrefpipeError when the engine fails, or ends without log-probs for a completion.
    """
    last = max((_parts(key)[0] for key in inflight.suspects), default=-1)
    whole = through_engine(
        shards,
        lambda requests: engine.score(requests, adapter=adapter),
        inflight,
        advance,
        last_suspect=last,
        things="completions",
    )
    for content, values in whole:
        yield content, {_parts(key)[1]: logps for key, logps in values.items()}


def killers(inflight: Inflight) -> frozenset[str]:
    """The completion_ids that killed the engine twice."""
    return frozenset(_parts(key)[1] for key in inflight.killers)


def _parts(key: str) -> tuple[int, str]:
    """(number of the shard, completion_id) of a key."""
    index, _, completion_id = key.partition("/")
    return int(index), completion_id
