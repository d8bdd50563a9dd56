"""Completions into an engine and log-probs out of it, shard by shard. The caller drops a completion that crashes the
engine twice."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from prefpipe.engines.base import Engine, ScoreRequest
from prefpipe.ids import ids_digest
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.shards import Shard, through_engine
from prefpipe.log import Advance
from prefpipe.rows import ref_logps
from prefpipe.schemas import Completion, RefLogps

Content = TypeVar("Content")
Values = dict[str, list[float]]  # completion_id -> log-probs (nats) of its scored tokens


def request_of(completion: Completion) -> ScoreRequest:
    """The request to score a completion."""
    ids = (completion.prompt_token_ids, completion.token_ids, completion.loss_mask)
    return ScoreRequest(completion.completion_id, *ids)


def shard_of(index: int, content: Content, requests: Sequence[ScoreRequest]) -> Shard[Content, ScoreRequest]:
    """A shard of completions. Their keys are INDEX/completion_id, since two shards may hold the same completion."""
    keyed = (replace(r, completion_id=key_of(index, r.completion_id)) for r in requests)
    return Shard(index, content, {r.completion_id: r for r in keyed})


def score_shards(
    shards: Iterable[Shard[Content, ScoreRequest]],
    engine: Engine,
    inflight: Inflight,
    advance: Advance,
    *,
    adapter: bool = True,
    last_suspect: int = -1,
) -> Iterator[tuple[Content, Values]]:
    """Score the completions of all shards: (content, log-probs) of every shard as soon as it is whole. Shards up to
    `last_suspect` are read at once.

    Raises PrefpipeError when the engine fails, or ends without log-probs for a completion.
    """
    whole = through_engine(
        shards,
        lambda requests: engine.score(requests, adapter=adapter),
        inflight,
        advance,
        last_suspect=last_suspect,
        things="completions",
    )
    for content, values in whole:
        yield content, {completion_of(key): logps for key, logps in values.items()}


def rows_of(requests: Iterable[ScoreRequest], values: Values, reference: str, scorer: str) -> list[RefLogps]:
    """Log-probs of completions as rows, in the order of the requests."""
    return [
        ref_logps(
            r.completion_id,
            ids_digest(r.prompt_token_ids, r.token_ids, r.loss_mask),
            values[r.completion_id],
            reference=reference,
            scorer=scorer,
        )
        for r in requests
    ]


def last_suspect(inflight: Inflight) -> int:
    """The number of the last shard with a suspected completion, -1 if there is none."""
    return max((int(key.partition("/")[0]) for key in inflight.suspects), default=-1)


def key_of(index: int, completion_id: str) -> str:
    """The key of a completion of a shard."""
    return f"{index}/{completion_id}"


def completion_of(key: str) -> str:
    """The completion_id in a key."""
    return key.partition("/")[2]
