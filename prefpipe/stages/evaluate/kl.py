"""KL divergence of the policy to other policies, on its sampled answers: kl/KEY has their log-probs of those."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefpipe import log, statistics
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.engines.base import ScoreRequest
from prefpipe.errors import DataError, IdentityError
from prefpipe.inference.filling import Start, engines_on_demand
from prefpipe.inference.task import Task, encoder
from prefpipe.models import vocabulary
from prefpipe.models.policy import Policy, resolve
from prefpipe.schemas import RefLogps
from prefpipe.stages.evaluate import scores
from prefpipe.stages.evaluate.answers import Answers, key


@dataclass(frozen=True)
class Target:
    """A policy to which the divergence is wanted. `name` is what the user wrote."""

    name: str
    policy: Policy
    id: str

    @property
    def dataset(self) -> str:
        """Where its log-probs stand."""
        return f"kl/{key(self.id)}"


def read(name: str, config: EvaluateConfig, task: Task) -> Target:
    """A policy by its name: base, a directory of an adapter on the model, or a model.

    Raises what `resolve` raises, and IdentityError for a model whose token ids are other tokens.
    """
    if name == "base":
        return Target(name, task.policy, task.policy.base_id)
    if (Path(name) / "adapter_config.json").exists():
        policy = resolve(config.model, name)
        return Target(name, policy, policy.id)
    policy = resolve(name)
    if policy.directory != task.policy.directory:
        ours = vocabulary.name(vocabulary.of_tokenizer(task.chat.tokenizer))
        theirs = vocabulary.name(vocabulary.read(policy.directory), int(ours.partition(":")[0]))
        if ours != theirs:
            raise IdentityError(
                f"kl_to = {name}: the same id is another token there (tokenizer: {theirs} there, {ours} here)",
                "a divergence needs policies with the same tokens",
            )
    return Target(name, policy, policy.id)


def fill(config: EvaluateConfig, answers: Answers, targets: Sequence[Target], start: Start) -> None:
    """Score what is missing for every target of the policy's model with its adapter off (engine of `start`)."""
    for target in targets:
        if target.name == "base" and target.id != answers.task.policy.id:
            _fill(config, answers, target, start)


def fill_others(config: EvaluateConfig, answers: Answers, targets: Sequence[Target]) -> None:
    """Score what is missing for every target that is another policy, each in an engine of its own."""
    for target in targets:
        if target.name != "base" and target.id != answers.task.policy.id:
            with engines_on_demand(replace(answers.task, policy=target.policy), config) as start:
                _fill(config, answers, target, start)


def totals(answers: Answers, target: Target) -> dict[str, Any]:
    """k1 and k3 per token and per sequence, in nats, with 95 % intervals by prompt.

    They estimate the divergence where samples are drawn from the policy itself: temperature 1, no top_p, top_k, min_p.
    """
    same = target.id == answers.task.policy.id
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])  # k1, k3, tokens, sequences by prompt
    for index in range(answers.num_shards):
        theirs = {} if same else _logps(answers, target, index)
        for row in answers.rows(index):
            ours = row.token_logps
            if row.decoding != "sampled" or ours is None or not (same or row.completion_id in theirs):
                continue
            k1, k3 = (0.0, 0.0) if same else statistics.kl_estimates(ours, theirs[row.completion_id])
            entry = sums[row.prompt_id]
            sums[row.prompt_id] = [a + b for a, b in zip(entry, (k1, k3, len(ours), 1), strict=True)]
    if not sums:
        raise DataError(
            f"KL to {target.name}: no sampled answer has log-probs", "sample again: give a new --out, or --force"
        )
    k1, k3, tokens, sequences = map(list, zip(*sums.values(), strict=True))
    return {
        "to": target.name,
        "policy": target.id,
        **{
            unit: statistics.ratio(k1, counts).named("k1") | statistics.ratio(k3, counts).named("k3")
            for unit, counts in (("per_token", tokens), ("per_sequence", sequences))
        },
    }


def notice_other_distribution(config: EvaluateConfig) -> None:
    """Warn where the samples are not drawn from the policy as it is."""
    if (config.temperature, config.top_p, config.top_k, config.min_p) != (1.0, 1.0, 0, 0.0):
        log.warn(
            "the KL divergence is that on samples of another distribution than the policy: it is an estimate for "
            "temperature = 1 without top_p, top_k and min_p only"
        )


def _fill(config: EvaluateConfig, answers: Answers, target: Target, start: Start) -> None:
    encode = encoder(answers.task, config)
    lacking = answers.lacking(target.dataset)
    sequences = (
        (
            index,
            [
                ScoreRequest(row.completion_id, encode(prompt), row.token_ids)
                for prompt, row in answered
                if row.decoding == "sampled" and row.token_logps is not None
            ],
        )
        for index, answered in answers.with_prompts(lacking)
    )
    scores.fill(
        answers.run,
        target.dataset,
        sequences,
        lambda: start(len(lacking)),
        reference=target.id,
        adapter=target.name != "base",
        rows_of=answers.rows_of,
    )


def _logps(answers: Answers, target: Target, index: int) -> dict[str, list[float]]:
    part = answers.run.read_part(target.dataset, RefLogps, index, ["completion_id", "token_logps"])
    return dict(zip(part["completion_id"].to_pylist(), part["token_logps"].to_pylist(), strict=True))
