"""Prompts into an engine and samples out of it, shard by shard.

Prompts are tokenised when the engine asks for the first request of their shard.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from prefpipe.engines.base import Draw, Engine, Request, Sample
from prefpipe.errors import RowFault
from prefpipe.ids import content_id
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.shards import Shard, through_engine
from prefpipe.log import Advance
from prefpipe.models.chat import Chat
from prefpipe.models.thinking import Said
from prefpipe.runs.resume import ROWS
from prefpipe.schemas import Dropped, Prompt

PromptShard = tuple[int, Sequence[Prompt]]  # number of a shard, its prompts
Encode = Callable[[Prompt], list[int]]  # prompt -> its token ids; raises RowFault when it cannot be sampled
Draws = Callable[[Prompt], tuple[Draw, ...]]  # prompt -> the completions to sample for it


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with its token ids."""

    prompt: Prompt
    token_ids: list[int]


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt with its samples. `said` has the text of each sample, split into reasoning and answer."""

    encoded: EncodedPrompt
    samples: list[Sample]
    said: list[Said]


@dataclass(frozen=True)
class SampledShard:
    """A whole shard: its prompts in order with their samples, the prompts that cannot be sampled, and the digest of its
    prompts for the commit records."""

    index: int
    sampled: list[SampledPrompt]
    dropped: list[Dropped]
    rows: Mapping[str, str]


@dataclass
class _EncodedShard:
    index: int
    rows: Mapping[str, str]
    prompts: list[EncodedPrompt] = field(default_factory=list[EncodedPrompt])
    dropped: list[Dropped] = field(default_factory=list[Dropped])


def cut(places: Iterable[Prompt | None], rows: int, wanted: Collection[int]) -> Iterator[PromptShard]:
    """Numbered shards of `rows` places of prompts, in order, without shards that hold no prompt. Only wanted shards are
    made, and one at a time is in memory."""
    source = iter(places)
    for index in range(max(wanted, default=-1) + 1):
        shard = islice(source, rows)
        if index in wanted:
            yield index, [prompt for prompt in shard if prompt is not None]
        else:
            for _ in shard:
                pass


def rows_of(prompts: Iterable[Prompt]) -> dict[str, str]:
    """The digest of the prompts of a shard. Beside the settings, its files depend on nothing else."""
    return {ROWS: content_id([(p.prompt_id, p.split, p.source, p.meta) for p in prompts])}


def last_suspect(shards: Iterable[PromptShard], suspects: Collection[str]) -> int:
    """The number of the last shard with a suspected prompt, -1 if there is none."""
    if not suspects:
        return -1
    return max((index for index, prompts in shards if any(p.prompt_id in suspects for p in prompts)), default=-1)


def sample_shards(
    prompt_shards: Iterable[PromptShard],
    encode: Encode,
    draws: Draws,
    engine: Engine,
    chat: Chat,
    inflight: Inflight,
    advance: Advance,
    last_suspect: int = -1,
) -> Iterator[SampledShard]:
    """Sample all prompts of some shards. Each shard is returned as soon as it is whole.

    In memory are the shards under way, and at the start all shards up to `last_suspect`. Raises PrefpipeError when the
    engine fails, or ends without samples for a prompt.
    """

    def shards() -> Iterator[Shard[_EncodedShard, Request]]:
        for index, prompts in prompt_shards:
            shard = _encoded(index, prompts, encode)
            advance(len(shard.dropped))
            requests = (Request(p.prompt.prompt_id, p.token_ids, draws(p.prompt)) for p in shard.prompts)
            yield Shard(index, shard, {request.prompt_id: request for request in requests})

    def generate(requests: Iterator[Request]) -> Iterator[tuple[str, list[Sample]]]:
        return ((request.prompt_id, samples) for request, samples in engine.generate(requests))

    whole = through_engine(shards(), generate, inflight, advance, last_suspect=last_suspect, things="prompts")
    for shard, samples in whole:
        yield SampledShard(shard.index, _with_texts(shard.prompts, samples, chat), shard.dropped, shard.rows)


def _encoded(index: int, prompts: Sequence[Prompt], encode: Encode) -> _EncodedShard:
    """A shard with tokenised prompts; those that cannot be sampled stand apart."""
    shard = _EncodedShard(index, rows_of(prompts))
    for prompt in prompts:
        try:
            shard.prompts.append(EncodedPrompt(prompt, encode(prompt)))
        except RowFault as fault:
            shard.dropped.append(Dropped(prompt.prompt_id, fault.reason, fault.detail))
    return shard


def _with_texts(prompts: Sequence[EncodedPrompt], samples: dict[str, list[Sample]], chat: Chat) -> list[SampledPrompt]:
    """Every prompt with its samples and their texts, which are decoded in one call for the shard."""
    texts = iter(chat.decode_all([s.token_ids for p in prompts for s in samples[p.prompt.prompt_id]]))
    return [
        SampledPrompt(p, drawn, [chat.said(s.token_ids, next(texts)) for s in drawn])
        for p, drawn in ((p, samples[p.prompt.prompt_id]) for p in prompts)
    ]
