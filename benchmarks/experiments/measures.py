"""Numbers from evaluations: a measure with its interval, the difference of two arms, and whether a hypothesis held."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from experiments.bench import Arm, Hypothesis
from prefpipe import statistics
from prefpipe.statistics import Estimate


def _values(measure: str, evaluation: Path) -> dict[str, list[float]]:
    """The values of a measure by prompt, one for each answer in a run of `prefpipe evaluate`."""
    rows = pl.read_parquet(evaluation / "evaluations" / "*.parquet").filter(
        pl.col("decoding") == ("greedy" if measure == "greedy" else "sampled")
    )
    if measure == "kl":
        parts = sorted(evaluation.glob("kl/*/*.parquet"))
        theirs = {
            c: v for part in parts for c, v in pl.read_parquet(part).select("completion_id", "token_logps").rows()
        }
        values = [
            statistics.kl_estimates(ours, theirs[key])[1] if theirs else 0.0
            for key, ours in rows.select("completion_id", "token_logps").rows()
        ]
    else:
        rewards = [reward or 0.0 for reward in rows["reward"]]
        values = rewards if measure == "closeness" else [float(reward >= 1) for reward in rewards]
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for prompt, value in zip(rows["prompt_id"], values, strict=True):
        by_prompt[prompt].append(value)
    return by_prompt


def mean(measure: str, evaluations: Sequence[Path]) -> Estimate:
    """A measure over the prompts of all seeds, with the interval that evaluate has for it."""
    groups = [group for evaluation in evaluations for group in _values(measure, evaluation).values()]
    return statistics.share(groups) if measure in ("sampled", "greedy") else statistics.mean(groups)


def _difference(measure: str, pairs: Sequence[tuple[Path, Path]]) -> Estimate:
    """The mean difference of two arms, paired by seed and prompt."""
    differences: list[float] = []
    for ours, theirs in ((_values(measure, a), _values(measure, b)) for a, b in pairs):
        differences += [sum(ours[p]) / len(ours[p]) - sum(theirs[p]) / len(theirs[p]) for p in ours]
    return statistics.mean([[d] for d in differences]) if measure == "kl" else statistics.paired(differences)


def judged(hypothesis: Hypothesis, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """The difference that a hypothesis is about, over all seeds and for each, and whether it held."""
    ours, theirs = arms.get(hypothesis.arm), arms.get(hypothesis.other)
    seeds = sorted(set(ours.evaluations) & set(theirs.evaluations)) if ours and theirs else []
    if not ours or not theirs or not seeds:
        return {**hypothesis._asdict(), "outcome": "not measured"}
    pairs = {seed: (ours.evaluations[seed], theirs.evaluations[seed]) for seed in seeds}
    difference = _difference(hypothesis.measure, list(pairs.values()))
    return {
        **hypothesis._asdict(),
        **difference.named("difference"),
        "seeds": {seed: _difference(hypothesis.measure, [pair]).value for seed, pair in pairs.items()},
        "outcome": outcome(hypothesis.sign, difference),
    }


def outcome(sign: int, difference: Estimate) -> str:
    """What the interval of a difference says about the sign that was expected."""
    shown = (difference.low > 0) - (difference.high < 0)
    if sign == 0:
        return "a difference" if shown else "none shown"
    return "held" if shown == sign else "the opposite" if shown else "not shown"
