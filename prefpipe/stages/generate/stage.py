"""Stage 1: prompts -> completions, with reference log-probs and rewards beside them.

    prefpipe generate stages/generate/short-sentence.toml --out DIR

1. Read prompts, policy, chat template and rewards, and identify each by its content.
2. Open DIR; a run that is complete stays as it is.
3. Sample every prompt that has no committed shard yet; commit each shard when it is whole.
4. Count over all shards.
5. Score `check` random completions again with the other engine: parity.json.
6. Write the ids of the models and the tokens, and the manifest.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.compute as pc

from prefpipe.config.generate import GenerateConfig
from prefpipe.engines.base import Engine
from prefpipe.ids import ids_digests, numbered_id
from prefpipe.inference import parity
from prefpipe.inference.filling import run_shards
from prefpipe.inference.sampling import SampledPrompt, SampledShard
from prefpipe.inference.scoring import request_of
from prefpipe.inference.task import (
    Task,
    answers_of,
    balances,
    engine_settings,
    open_task,
    prompt_key,
    read_task,
    sampled_draws,
)
from prefpipe.inference.works import Part, Rewards, part_of
from prefpipe.models import vocabulary
from prefpipe.rewards import rating
from prefpipe.rows import ref_logps
from prefpipe.runs.settled import settled
from prefpipe.runs.store import Manifest, Run
from prefpipe.runs.tables import among
from prefpipe.schemas import Completion, Dropped, Prompt, RefLogps, Reward, from_table

R = TypeVar("R")


def run(config: GenerateConfig, out: Path, *, force: bool) -> Manifest:
    """Sample, score and rate every prompt that has no committed shard yet."""
    config = settled(config, out)
    read = read_task(config, config.rewards)
    with open_task(out, "generate", config, read, force=force) as (output, task):
        manifest = output.manifest()
        if manifest is not None:
            return manifest
        reference = _reference(config, task)
        num_shards = run_shards(
            output,
            task,
            config,
            _datasets(task, reference),
            partial(sampled_draws, config, range(config.num_samples)),
            partial(_parts, config, task.portable(), reference, Rewards(task.rewards, config.reward_settings)),
        )
        totals = _totals(output, num_shards, list(task.rewards))
        if config.check and reference:
            totals["parity"] = _check(config, output, task, reference, num_shards)
            output.write_report("parity.json", totals["parity"])
        tokens = vocabulary.record([vocabulary.name(vocabulary.of_tokenizer(task.chat.tokenizer))])
        balance = balances(output, task, num_shards, "completions", Completion, config.num_samples)
        return output.finish(totals, {"policy": task.policy.id, "reference": reference, **tokens}, balance)


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    t = manifest["totals"]
    lines = [f"{t['completions']} completions of {t['prompts']} prompts in {out}, {t['tokens']} tokens"]
    return [*lines, *rating.summary(t), *(parity.table(t["parity"]) if "parity" in t else [])]


def _reference(config: GenerateConfig, task: Task) -> str | None:
    """The id of the reference; None when no log-probs are cached."""
    return {"policy": task.policy.id, "base": task.policy.base_id, "none": None}[config.reference]


def _datasets(task: Task, reference: str | None) -> list[str]:
    """The datasets of a shard, in the order in which they are written."""
    logps = ["ref_logps"] if reference else []
    return ["dropped", "prompts", *logps, *map(rating.reward_folder, task.rewards), "completions"]


def _parts(
    config: GenerateConfig, task: Task, reference: str | None, rewards: Rewards, shard: SampledShard, engine: Engine
) -> list[Part]:
    """The datasets of one shard. The completions are written last, so that a shard that has them is whole."""
    completions = [c for prompt in shard.sampled for c in _completions(config, task, prompt)]
    parts = [
        part_of("dropped", Dropped, shard.dropped, shard.rows),
        part_of("prompts", Prompt, [prompt.encoded.prompt for prompt in shard.sampled], shard.rows),
    ]
    if reference:
        logps = _token_logps(shard, completions, engine, captured=reference == task.policy.id)
        rows = [
            ref_logps(c.completion_id, c.ids_digest, v, reference=reference, scorer=engine.scorer)
            for c, v in zip(completions, logps, strict=True)
        ]
        parts.append(part_of("ref_logps", RefLogps, rows, shard.rows))
    answers = answers_of(shard.sampled, config.reward_on) if rewards.functions else []
    for name, function in rewards.functions.items():
        scores = zip(completions, rating.rate(answers, function, name), strict=True)
        rated = [Reward(c.completion_id, name, s.reward, s.status, s.detail) for c, s in scores]
        parts.append(part_of(rating.reward_folder(name), Reward, rated, shard.rows))
    return [*parts, part_of("completions", Completion, completions, shard.rows)]


def _completions(config: GenerateConfig, task: Task, sampled: SampledPrompt) -> Iterator[Completion]:
    """The rows of the samples of a prompt."""
    encoded = sampled.encoded
    key = prompt_key(config, task, encoded)
    digests = ids_digests(encoded.token_ids, [s.token_ids for s in sampled.samples])
    for sample, said, digest in zip(sampled.samples, sampled.said, digests, strict=True):
        yield Completion(
            completion_id=numbered_id(key, sample.sample_index),
            prompt_id=encoded.prompt.prompt_id,
            sample_index=sample.sample_index,
            text=said.text,
            prompt_token_ids=encoded.token_ids,
            token_ids=sample.token_ids,
            finish_reason=sample.finish_reason,
            policy=task.policy.id,
            ids_digest=digest,
            thinking=said.thinking,
            thinking_tokens=said.thinking_tokens,
        )


def _token_logps(
    shard: SampledShard, completions: Sequence[Completion], engine: Engine, *, captured: bool
) -> list[list[float]]:
    """Reference log-probs (nats) of the tokens of each completion: the captured ones where the policy is the reference,
    else those of a scoring pass with the adapter off."""
    if captured:
        return [sample.token_logps for prompt in shard.sampled for sample in prompt.samples]
    scored = dict(engine.score(map(request_of, completions), adapter=False))
    return [scored[c.completion_id] for c in completions]


def _totals(output: Run, num_shards: int, reward_names: Sequence[str]) -> dict[str, Any]:
    """Counts over all shards, read from the files column by column, so that an interruption changes nothing."""
    counts = {"prompts": 0, "completions": 0, "tokens": 0}
    for index in range(num_shards):
        part = output.read_part("completions", Completion, index, ["prompt_id", "token_ids"])
        counts["prompts"] += len(part["prompt_id"].unique())
        counts["completions"] += part.num_rows
        lengths = pc.call_function("list_value_length", [part["token_ids"]])
        counts["tokens"] += pc.call_function("sum", [lengths]).as_py() or 0
    return counts | rating.totals({name: [_rewards(output, num_shards, name)] for name in reward_names})


def _rewards(output: Run, num_shards: int, name: str) -> list[float | None]:
    folder = rating.reward_folder(name)
    parts = (output.read_part(folder, Reward, index, ["reward"])["reward"].to_pylist() for index in range(num_shards))
    return [reward for part in parts for reward in part]


def _check(config: GenerateConfig, output: Run, task: Task, reference: str, num_shards: int) -> dict[str, Any]:
    """Score random completions again with the other engine. Only shards that hold one of them are read."""
    parts = [output.read_part("ref_logps", RefLogps, index, ["completion_id"]) for index in range(num_shards)]
    names = (name for part in parts for name in part["completion_id"].to_pylist())
    picked = sorted(parity.pick(names, config.check, config.seed))

    def read(dataset: str, row_type: type[R], index: int) -> list[R]:
        return from_table(row_type, among(output.read_part(dataset, row_type, index), picked))

    cached: list[parity.CachedLogps] = []
    scorer = ""
    for index in (i for i, part in enumerate(parts) if among(part, picked).num_rows):
        logps = {row.completion_id: row for row in read("ref_logps", RefLogps, index)}
        for completion in read("completions", Completion, index):
            row = logps[completion.completion_id]
            cached.append(parity.CachedLogps(request_of(completion), row.token_logps))
            scorer = row.scorer
    lengths = (len(c.request.prompt_token_ids) + len(c.request.token_ids) for c in cached)
    settings = engine_settings(task, config, max(lengths, default=1))
    return parity.check(cached, config.engine, scorer, settings, adapter=reference == task.policy.id)
