"""Prompts to an engine to committed shards, for generate and evaluate. Nothing is sampled twice."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from prefpipe import chat as chats
from prefpipe import engines, fsio, ingest, log, models, rewards, store
from prefpipe.chat import Chat, RowFault, encode_prompt
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.rewards import Settings
from prefpipe.engines.base import Draw, Engine, EngineSettings, Request, Sample
from prefpipe.errors import DataError, PrefpipeError, UsageError
from prefpipe.ids import content_id, ids_digest
from prefpipe.inflight import Inflight
from prefpipe.models import Policy
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.schemas import Dropped, Prompt, to_table
from prefpipe.store import Run

_SHARDS, _FEWEST_ROWS, _MOST_ROWS = 64, 16, 512
Config = GenerateConfig | EvaluateConfig


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


@dataclass(frozen=True)
class Task:
    """The prompts of a run, what answers them, what rates the answers, and what identifies all that."""

    prompts: list[Prompt]
    repeated: list[Dropped]
    policy: Policy
    chat: Chat
    rewards: Mapping[str, RewardFunction]
    inputs: Mapping[str, str]


class Work(Protocol):
    """What a stage does with shards of prompts."""

    def has(self, index: int) -> bool:
        """Whether a shard is committed."""
        ...

    def draws(self, prompt: Prompt) -> tuple[Draw, ...]:
        """The completions to sample for a prompt."""
        ...

    def commit(self, index: int, sampled: list[Sampled], engine: Engine) -> None:
        """Write a shard. A prompt that cannot be sampled is not in it."""
        ...


def read_task(config: Config, reward_names: Sequence[str]) -> Task:
    """Read and identify everything that sampling needs, before the output directory is touched."""
    if not config.prompts:
        raise UsageError("no prompts given", "pass --prompts FILE (JSONL or Parquet)")
    prompts_file = Path(config.prompts)
    prompts, repeated = ingest.read_prompts(prompts_file, config.split, config.limit)
    policy = models.resolve(config.model, config.adapter)
    chat = chats.load(policy.directory, config.chat_template, config.template_date)
    for notice in chats.notices(chat):
        log.info(f"notice: {notice}")
    functions, reward_ids = load_rewards(reward_names, config.reward_settings)
    inputs = {"prompts": store.input_digest(prompts_file), "policy": policy.id, **chat.digests, **reward_ids}
    return Task(_part(prompts, config.part), repeated, policy, chat, functions, inputs)


def run_shards(run: Run, task: Task, config: Config, work: Work) -> int:
    """Sample every prompt that has no committed shard yet; returns the number of shards of the run."""
    ready, faulty = prepare(
        task.prompts, task.chat, max_prompt_tokens=_longest_prompt(config, task.policy),
        control_tokens=config.special_tokens_in_prompts,
    )  # fmt: skip
    inflight = Inflight.load(run.out)
    killers = [
        Dropped(i, "engine_died", "the engine died twice while it worked on this prompt") for i in inflight.killers
    ]
    run.write_dropped(Dropped, to_table(Dropped, task.repeated + faulty + killers))
    shards = shard(ready, run.saved["shard_rows"] or _fitting_rows(len(task.prompts)))
    missing = [(index, rows) for index, rows in shards if not work.has(index)]
    if missing:
        start = fsio.monotonic()
        longest = max(len(r.token_ids) for _, rows in missing for r in rows)
        settings = engine_settings(task, config, longest + config.max_tokens)
        with start_engine(config.engine, settings) as engine, inflight.recording():
            tokens = sample_shards(missing, engine, work, task.chat, inflight)
        run.log_timing(event="sampled", tokens=tokens, seconds=round(fsio.monotonic() - start, 3))
    inflight.close()
    return len(shards)


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


def engine_settings(task: Task, config: Config, max_model_len: int) -> EngineSettings:
    """Engine settings with room for `max_model_len` tokens in prompt and completion."""
    return EngineSettings(
        task.policy, task.chat, config.dtype, config.top_p, config.max_tokens, max_model_len,
        config.max_num_seqs, config.kv_cache_mib, top_k=config.top_k, min_p=config.min_p,
        stop_token_ids=config.stop_token_ids, tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )  # fmt: skip


def prompt_key(config: Config, policy: str, ready: Ready) -> str:
    """What the completions of a prompt have in common: its messages and ids, the policy and how it samples. The id of
    a completion is a hash of this and its sample_index: num_samples and order are no part of it."""
    sampling = [
        *(config.engine, config.dtype, config.seed, config.temperature, config.top_p, config.top_k, config.min_p),
        *(config.max_tokens, config.stop_token_ids),
    ]
    return content_id(ready.prompt.prompt_id, ids_digest(ready.token_ids, ()), policy, sampling)


def sample_shards(
    shards: Sequence[tuple[int, Sequence[Ready]]], engine: Engine, work: Work, chat: Chat, inflight: Inflight
) -> int:
    """Sample all prompts of (index, prompts) shards without a pause between shards; commit each when it is whole.

    Prompts under suspicion of having killed the engine run first, one at a time. Returns the number of tokens sampled.
    """
    ready = {r.prompt.prompt_id: r for _, rows in shards for r in rows if r.prompt.prompt_id not in inflight.killers}
    of_shard = {r.prompt.prompt_id: index for index, rows in shards for r in rows}
    order = {index: [r.prompt.prompt_id for r in rows if r.prompt.prompt_id in ready] for index, rows in shards}
    done: dict[int, dict[str, tuple[Ready, list[Sample]]]] = {index: {} for index in order}
    num_tokens = 0

    def finish(index: int) -> None:
        own = done.pop(index)
        found = [own[prompt_id] for prompt_id in order[index]]
        texts = iter(chat.decode_all([s.token_ids for _, samples in found for s in samples]))
        sampled = [Sampled(r, samples, [next(texts) for _ in samples]) for r, samples in found]
        work.commit(index, sampled, engine)

    for index, ids in order.items():
        if not ids:
            finish(index)
    with log.progress("sampling", len(ready), "prompts") as advance:
        for prompt_id, samples in _answers(ready, engine, work, inflight):
            index = of_shard[prompt_id]
            done[index][prompt_id] = (ready.pop(prompt_id), samples)
            num_tokens += sum(len(s.token_ids) for s in samples)
            advance(1)
            if len(done[index]) == len(order[index]):
                finish(index)
    return num_tokens


def shard(ready: Sequence[Ready], rows: int) -> list[tuple[int, Sequence[Ready]]]:
    """Cut prompts into numbered shards, in their order."""
    return [(number, ready[start : start + rows]) for number, start in enumerate(range(0, len(ready), rows))]


def answers_of(sampled: Sequence[Sampled]) -> list[Answer]:
    """Every sample with what it answers, the samples of a prompt together."""
    return [
        Answer(p.messages, text, p.answer, p.meta, len(sample.token_ids))
        for s in sampled
        for p in [s.ready.prompt]
        for text, sample in zip(s.texts, s.samples, strict=True)
    ]


def rate(answers: Sequence[Answer], reward: RewardFunction, name: str) -> list[Scored]:
    """The score of every answer; a reward that crashes on all of them is an error."""
    scores = reward(answers) if answers else []
    if scores and all(s.status == "crash" for s in scores):
        raise DataError(
            f"reward {name} failed on all {len(scores)} completions: {scores[0].detail}", "fix the function"
        )
    return scores


def reward_folder(name: str) -> str:
    """The dataset of a reward."""
    return f"rewards/{name}"


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


def _answers(
    ready: Mapping[str, Ready], engine: Engine, work: Work, inflight: Inflight
) -> Iterator[tuple[str, list[Sample]]]:
    """(prompt_id, samples) as the engine finishes them; what it works on is on record meanwhile."""
    alone = [prompt_id for prompt_id in inflight.suspects if prompt_id in ready]
    together = ready.keys() - set(alone)
    rest = [prompt_id for prompt_id in ready if prompt_id in together]

    def requests(ids: Sequence[str], *, alone: bool) -> Iterator[Request]:
        for prompt_id in ids:
            inflight.take(prompt_id, alone=alone)
            r = ready[prompt_id]
            yield Request(prompt_id, list(r.token_ids), work.draws(r.prompt))

    for ids in [*([i] for i in alone), rest]:
        results = engine.generate(requests(ids, alone=ids is not rest))
        while True:
            try:
                request, samples = next(results)
            except StopIteration:
                break
            except PrefpipeError:
                raise
            except Exception as error:
                inflight.died()
                raise _died(error, inflight) from error
            inflight.done(request.prompt_id)
            yield request.prompt_id, samples


def _died(error: Exception, inflight: Inflight) -> PrefpipeError:
    return PrefpipeError(
        f"the engine died while it worked on {len(inflight.open)} prompts: {type(error).__name__}: {error}",
        "run the same command again: these prompts run first, one at a time, and one that kills the engine again goes "
        "to dropped.parquet",
    )


def _fitting_rows(num_prompts: int) -> int:
    """Prompts in a shard: enough that commits cost nothing, few enough that little is lost when a run is killed."""
    return min(_MOST_ROWS, max(_FEWEST_ROWS, math.ceil(num_prompts / _SHARDS)))


def _part(prompts: list[Prompt], part: str) -> list[Prompt]:
    number, _, count = part.partition("/")
    if int(number) > int(count):
        raise UsageError(f"part = '{part}': there are only {count} parts", "write I/N with I from 1 to N")
    return prompts[int(number) - 1 :: int(count)]


def _longest_prompt(config: Config, policy: Policy) -> int:
    """max_prompt_tokens, or less where prompt, completion and one token more would not fit into the model's context."""
    context = models.context_length(policy.directory)
    return (
        config.max_prompt_tokens if context is None else min(config.max_prompt_tokens, context - config.max_tokens - 1)
    )
