"""Shards of prompts through an engine: no pause between shards, each committed when it is whole.

Prompts are tokenised shard by shard, as the engine asks for more, and a prompt that kills the engine is found.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Protocol

from prefpipe.engines.base import Draw, Engine, Request, Sample
from prefpipe.errors import RowFault
from prefpipe.inference.inflight import Inflight
from prefpipe.log import Advance
from prefpipe.models.chat import Chat
from prefpipe.schemas import Dropped, Prompt

Prepare = Callable[[Prompt], list[int]]
Shard = tuple[int, Sequence[Prompt]]


@dataclass(frozen=True)
class Ready:
    """A prompt with its token ids."""

    prompt: Prompt
    token_ids: list[int]


@dataclass(frozen=True)
class Sampled:
    """A prompt with its samples, and their texts."""

    ready: Ready
    samples: list[Sample]
    texts: list[str]


class Work(Protocol):
    """What a stage does with shards of prompts."""

    def has(self, index: int) -> bool:
        """Whether a shard is committed."""
        ...

    def draws(self, prompt: Prompt) -> tuple[Draw, ...]:
        """The completions to sample for a prompt."""
        ...

    def commit(self, index: int, sampled: list[Sampled], dropped: list[Dropped], engine: Engine) -> None:
        """Write a shard: the prompts that were sampled, and those that could not be."""
        ...


@dataclass
class _Filling:
    """A shard that fills: its prompts in their order, the samples so far, and the prompts that cannot be sampled."""

    ready: dict[str, Ready] = field(default_factory=dict[str, Ready])
    samples: dict[str, list[Sample]] = field(default_factory=dict[str, list[Sample]])
    dropped: list[Dropped] = field(default_factory=list[Dropped])


def cut(prompts: Iterable[Prompt], rows: int, wanted: set[int]) -> Iterator[Shard]:
    """Prompts in numbered shards of `rows`, in their order; only the wanted ones, and one at a time in memory."""
    source = iter(prompts)
    for index in range(max(wanted, default=-1) + 1):
        own = islice(source, rows)
        if index in wanted:
            yield index, list(own)
        else:
            for _ in own:
                pass


def sample_shards(
    missing: Callable[[], Iterable[Shard]],
    prepare: Prepare,
    engine: Engine,
    work: Work,
    chat: Chat,
    inflight: Inflight,
    advance: Advance,
) -> int:
    """Sample all prompts of the missing shards without a pause between shards; commit each when it is whole.

    `missing` reads them anew at every call. The prompts of a shard are tokenised when the engine asks for its first:
    what is in memory are the shards that are being filled. Prompts under suspicion of having killed the engine run
    first, one at a time. Returns the number of tokens sampled.
    """
    filling: dict[int, _Filling] = {}
    shard_of: dict[str, int] = {}

    def finish(index: int) -> None:
        own = filling.pop(index)
        found = [(ready, own.samples[prompt_id]) for prompt_id, ready in own.ready.items()]
        texts = iter(chat.decode_all([s.token_ids for _, samples in found for s in samples]))
        sampled = [Sampled(r, samples, [next(texts) for _ in samples]) for r, samples in found]
        work.commit(index, sampled, own.dropped, engine)

    early = _sample_suspects(missing, prepare, engine, work, inflight)
    num_tokens = sum(len(s.token_ids) for samples in early.values() for s in samples)

    def requests() -> Iterator[Request]:
        for index, prompts in missing():
            own = filling[index] = _fill(prompts, prepare)
            own.samples |= {i: early.pop(i) for i in own.ready if i in early}
            advance(len(own.samples) + len(own.dropped))
            left = [ready for prompt_id, ready in own.ready.items() if prompt_id not in own.samples]
            shard_of.update((ready.prompt.prompt_id, index) for ready in left)
            if not left:
                finish(index)
            for ready in left:
                yield _request(ready, work)

    for prompt_id, samples in _answers(requests(), engine, inflight, alone=False):
        index = shard_of.pop(prompt_id)
        own = filling[index]
        own.samples[prompt_id] = samples
        num_tokens += sum(len(s.token_ids) for s in samples)
        advance(1)
        if len(own.samples) == len(own.ready):
            finish(index)
    return num_tokens


def _fill(prompts: Iterable[Prompt], prepare: Prepare) -> _Filling:
    """A shard whose prompts are tokenised, those apart that cannot be sampled."""
    shard = _Filling()
    for prompt in prompts:
        try:
            shard.ready[prompt.prompt_id] = Ready(prompt, prepare(prompt))
        except RowFault as fault:
            shard.dropped.append(Dropped(prompt.prompt_id, fault.reason, fault.detail))
    return shard


def _sample_suspects(
    missing: Callable[[], Iterable[Shard]], prepare: Prepare, engine: Engine, work: Work, inflight: Inflight
) -> dict[str, list[Sample]]:
    """Samples of the prompts under suspicion that are still to be answered, each alone in the engine."""
    if not inflight.suspects:
        return {}
    suspects = {p.prompt_id: p for _, prompts in missing() for p in prompts if p.prompt_id in inflight.suspects}
    shard = _fill([suspects[i] for i in inflight.suspects if i in suspects], prepare)
    requests = [_request(ready, work) for ready in shard.ready.values()]
    return dict(chain.from_iterable(_answers(iter([own]), engine, inflight, alone=True) for own in requests))


def _request(ready: Ready, work: Work) -> Request:
    return Request(ready.prompt.prompt_id, list(ready.token_ids), work.draws(ready.prompt))


def _answers(
    requests: Iterator[Request], engine: Engine, inflight: Inflight, *, alone: bool
) -> Iterator[tuple[str, list[Sample]]]:
    """(prompt_id, samples) as the engine finishes them; what it works on is on record meanwhile."""
    given = inflight.entering(requests, lambda request: request.prompt_id, alone=alone)
    for request, samples in inflight.watch(engine.generate(given), "prompts"):
        inflight.done(request.prompt_id)
        yield request.prompt_id, samples
