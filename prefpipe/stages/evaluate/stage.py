"""Greedy and sampled answers of a policy to held-out prompts, rated, with intervals.

    prefpipe evaluate stages/evaluate/short-sentence.toml --adapter runs/t/adapter --out DIR

1. Read prompts, policy, chat template and reward, and identify each by its content.
2. Open DIR; a run that is complete stays as it is.
3. Sample every prompt that has no committed shard yet, rate the answers; commit each shard when it is whole.
4. Sum up over all shards: pass rates with intervals, mean reward, length, degenerate answers.
5. Write the manifest.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.shared import REWARD_CHOICES
from prefpipe.engines.base import Draw, Engine
from prefpipe.errors import UsageError
from prefpipe.ids import numbered_id
from prefpipe.inference.sampling import SampledPrompt, SampledShard
from prefpipe.inference.task import (
    Task,
    answers_of,
    balances,
    open_task,
    prompt_key,
    read_task,
    run_shards,
    sampled_draws,
)
from prefpipe.rewards import rating
from prefpipe.rewards.base import Scored
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Dropped, Evaluation, Prompt, from_table, to_table

_DATASET = "evaluations"
_RESAMPLES = 2000


def run(config: EvaluateConfig, out: Path, *, force: bool) -> Manifest:
    """Sample every prompt that has no committed shard yet, rate the answers, sum up."""
    if not config.reward:
        raise UsageError("no reward given: nothing says which answers pass", f"pass --reward NAME: {REWARD_CHOICES}")
    read = read_task(config, [config.reward])
    with open_task(out, "evaluate", config, read, force=force) as (output, task):
        manifest = output.manifest()
        if manifest is not None:
            return manifest
        num_shards = run_shards(
            output,
            task,
            config,
            ["dropped", _DATASET],
            lambda prompt: draws(config, prompt),
            partial(_commit, config, output, task),
        )
        rows = [
            row
            for index in range(num_shards)
            for row in from_table(Evaluation, output.read_part(_DATASET, Evaluation, index))
        ]
        totals = {"round": config.round, **summarize(rows, config.pass_reward)}
        samples = len(draws(config, next(iter(task.prompts))))
        balance = balances(output, task, num_shards, _DATASET, Evaluation, samples)
        return output.finish(totals, {"policy": task.policy.id}, balance)


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    t = manifest["totals"]
    lines = [f"{t['prompts']} prompts rated in {out}"]
    for decoding in ("greedy", "sampled"):
        d = t[decoding]
        lines.append(
            f"  {decoding}: pass {d['pass']:.1%} [{d['low']:.1%}, {d['high']:.1%}], "
            f"mean reward {d['mean_reward']:.3f}, mean length {d['mean_words']:.1f} words, "
            f"degenerate {d['degenerate']:.1%}"
        )
    return lines


def draws(config: EvaluateConfig, prompt: Prompt) -> tuple[Draw, ...]:
    """The completions to sample for a prompt: 0 is greedy, the others are sampled."""
    return Draw(0, 0, 0.0), *sampled_draws(config, prompt, range(1, config.num_samples + 1))


def summarize(rows: Sequence[Evaluation], pass_reward: float) -> dict[str, Any]:
    """Pass rate with a 95 % interval, mean reward, mean length and share of degenerate answers, for greedy and for
    sampled answers.

    Greedy: Wilson interval (one answer per prompt). Sampled: bootstrap over prompts, since the answers to one prompt
    are not independent.
    """
    texts = Counter((d, t) for d, t, _ in {(r.decoding, r.text.strip(), r.prompt_id) for r in rows})
    result: dict[str, Any] = {"prompts": len({r.prompt_id for r in rows})}
    for decoding in ("greedy", "sampled"):
        answers = [r for r in rows if r.decoding == decoding]
        passed: dict[str, list[bool]] = {}  # by prompt
        for r in answers:
            passed.setdefault(r.prompt_id, []).append(r.reward is not None and r.reward >= pass_reward)
        interval = wilson([p for (p,) in passed.values()]) if decoding == "greedy" else bootstrap(list(passed.values()))
        rewards = [r.reward for r in answers if r.reward is not None]
        result[decoding] = {
            "answers": len(answers),
            "pass": _rate(list(passed.values())),
            "low": interval[0],
            "high": interval[1],
            "mean_reward": sum(rewards) / len(rewards) if rewards else 0.0,
            "mean_words": sum(len(r.text.split()) for r in answers) / len(answers),
            "degenerate": sum(is_degenerate(r, texts[(decoding, r.text.strip())] > 2) for r in answers) / len(answers),
        }
    return result


def wilson(passed: Sequence[bool], z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927), 95 % by default."""
    n, p = len(passed), sum(passed) / len(passed)
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def bootstrap(groups: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % percentile interval of the pass rate when whole groups (prompts) are resampled; deterministic."""
    source = random.Random(0)
    rates = sorted(_rate(source.choices(groups, k=len(groups))) for _ in range(_RESAMPLES))
    return rates[int(0.025 * _RESAMPLES)], rates[int(0.975 * _RESAMPLES) - 1]


def is_degenerate(row: Evaluation, repeated: bool) -> bool:  # noqa: FBT001  (a fact about the row, which only the caller can know)
    """Whether an answer has under three words, was cut at max_tokens, says the same three words three times, or is the
    text of an answer to several prompts (`repeated`)."""
    words = row.text.split()
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    loops = bool(trigrams) and max(trigrams.values()) >= 3
    return len(words) < 3 or row.finish_reason == "length" or loops or repeated


def _rate(groups: Sequence[Sequence[bool]]) -> float:
    return sum(map(sum, groups)) / sum(map(len, groups))


def _commit(config: EvaluateConfig, output: Run, task: Task, shard: SampledShard, _engine: Engine) -> None:
    """Write one shard. The evaluations come last, so that a shard with them is whole."""
    scores = iter(rating.rate(answers_of(shard.sampled, config.reward_on), task.rewards[config.reward], config.reward))
    rows = [_row(config, task, prompt, i, next(scores)) for prompt in shard.sampled for i in range(len(prompt.said))]
    output.write_part("dropped", Dropped, shard.index, to_table(Dropped, shard.dropped), shard.rows)
    output.write_part(_DATASET, Evaluation, shard.index, to_table(Evaluation, rows), shard.rows)


def _row(config: EvaluateConfig, task: Task, sampled: SampledPrompt, i: int, score: Scored) -> Evaluation:
    """The row of sample i of a prompt, with its score."""
    sample, prompt = sampled.samples[i], sampled.encoded.prompt
    return Evaluation(
        completion_id=numbered_id(prompt_key(config, task, sampled.encoded), sample.sample_index),
        prompt_id=prompt.prompt_id,
        sample_index=sample.sample_index,
        round=config.round,
        decoding="greedy" if sample.sample_index == 0 else "sampled",
        messages=prompt.messages,
        text=sampled.said[i].text,
        token_ids=sample.token_ids,
        finish_reason=sample.finish_reason,
        policy=task.policy.id,
        name=config.reward,
        reward=score.reward,
        status=score.status,
        detail=score.detail,
        thinking=sampled.said[i].thinking,
    )
