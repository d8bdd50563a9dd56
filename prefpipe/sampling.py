"""Prompts to an engine to committed shards, for generate and evaluate. Nothing is sampled twice."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from prefpipe import engines, log, rewards
from prefpipe.chat import Chat, RowFault, encode_prompt
from prefpipe.config.rewards import Settings
from prefpipe.engines.base import Draw, Engine, EngineSettings, Request, Sample
from prefpipe.errors import DataError
from prefpipe.models import Policy
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.schemas import Dropped, Prompt


@dataclass(frozen=True)
class Ready:
    """A prompt with its token ids."""

    prompt: Prompt
    token_ids: list[int]


@dataclass(frozen=True)
class Sampled:
    """A prompt with its samples."""

    ready: Ready
    samples: list[Sample]


def prepare(
    prompts: Sequence[Prompt], chat: Chat, *, max_prompt_tokens: int, control_tokens: str
) -> tuple[list[Ready], list[Dropped]]:
    """Tokenise prompts; faulty ones go to the ledger. Raises DataError when none is left."""
    ready: list[Ready] = []
    dropped: list[Dropped] = []
    for prompt in prompts:
        try:
            ids = encode_prompt(chat, prompt.messages, max_tokens=max_prompt_tokens, control_tokens=control_tokens)
            ready.append(Ready(prompt, ids))
        except RowFault as fault:
            dropped.append(Dropped(prompt.prompt_id, fault.reason, fault.detail))
    if not ready:
        reasons = sorted({d.reason for d in dropped})
        raise DataError(f"no prompt is left: all {len(dropped)} were dropped ({', '.join(reasons)})", dropped[0].detail)
    if dropped:
        log.warn(f"{len(dropped)} of {len(prompts)} prompts dropped; the reasons are in dropped.parquet")
    return ready, dropped


def engine_settings(
    policy: Policy, chat: Chat, ready: Sequence[Ready], *, dtype: str, top_p: float, max_tokens: int,
    max_num_seqs: int, kv_cache_mib: int,
) -> EngineSettings:  # fmt: skip
    """Engine settings with room for the longest prompt and a full completion."""
    longest = max(len(r.token_ids) for r in ready)
    return EngineSettings(policy, chat, dtype, top_p, max_tokens, longest + max_tokens, max_num_seqs, kv_cache_mib)


def sample_shards(
    shards: Sequence[tuple[int, Sequence[Ready]]],
    engine: Engine,
    draws: Callable[[Prompt], tuple[Draw, ...]],
    commit: Callable[[int, list[Sampled]], None],
) -> int:
    """Sample all prompts of (index, prompts) shards without a pause between shards; commit each when it is whole.

    Returns the number of tokens sampled.
    """
    of_shard = {r.prompt.prompt_id: index for index, shard in shards for r in shard}
    ready = {r.prompt.prompt_id: r for _, shard in shards for r in shard}
    done: dict[int, dict[str, Sampled]] = {index: {} for index, _ in shards}
    sizes = {index: len(shard) for index, shard in shards}
    order = {index: [r.prompt.prompt_id for r in shard] for index, shard in shards}
    num_tokens = 0

    def requests() -> Iterator[Request]:
        for _, shard in shards:
            for r in shard:
                yield Request(r.prompt.prompt_id, r.token_ids, draws(r.prompt))

    with log.progress("sampling", len(ready), "prompts") as advance:
        for request, samples in engine.generate(requests()):
            index = of_shard[request.prompt_id]
            done[index][request.prompt_id] = Sampled(ready[request.prompt_id], samples)
            num_tokens += sum(len(s.token_ids) for s in samples)
            advance(1)
            if len(done[index]) == sizes[index]:
                finished = done.pop(index)
                commit(index, [finished[prompt_id] for prompt_id in order[index]])
    return num_tokens


def shard(ready: Sequence[Ready], rows: int) -> list[tuple[int, Sequence[Ready]]]:
    """Cut prompts into numbered shards, in their order."""
    return [(number, ready[start : start + rows]) for number, start in enumerate(range(0, len(ready), rows))]


def rate(sampled: Sequence[Sampled], chat: Chat, reward: RewardFunction, name: str) -> list[list[Scored]]:
    """The scores of every sample of every prompt; a reward that crashes on all of them is an error."""
    answers = [
        Answer(p.messages, chat.decode(sample.token_ids), p.answer, p.meta, len(sample.token_ids))
        for s in sampled
        for p in [s.ready.prompt]
        for sample in s.samples
    ]
    scores = reward(answers)
    if scores and all(s.status == "crash" for s in scores):
        raise DataError(
            f"reward {name} failed on all {len(scores)} completions: {scores[0].detail}", "fix the function"
        )
    values = iter(scores)
    return [[next(values) for _ in s.samples] for s in sampled]


def start_engine(name: str, settings: EngineSettings) -> Engine:
    """Start an engine, and say so: it takes a while."""
    log.info(f"starting engine {name} ({settings.policy.directory.name}, {settings.dtype})")
    return engines.load(name, settings)


def load_rewards(
    names: Sequence[str], tables: Mapping[str, Settings] = MappingProxyType({})
) -> tuple[dict[str, RewardFunction], dict[str, str]]:
    """Reward functions by name with their settings, and what identifies them."""
    return (
        {n: rewards.load(n, tables) for n in names},
        {f"reward {n}": rewards.identity(n, tables) for n in names},
    )
