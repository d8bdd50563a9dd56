"""The answers of a policy against those of a baseline, on the prompts that both have: by reward, and by a judge.

An answer is compared with the one of the same number: the greedy ones with each other, sample 1 with sample 1.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefpipe import log, statistics
from prefpipe.errors import DataError
from prefpipe.schemas import Evaluation, Prompt
from prefpipe.stages.evaluate import baselines, measures
from prefpipe.stages.evaluate.answers import Answers
from prefpipe.stages.evaluate.baselines import Baseline, Key, Other
from prefpipe.statistics import Estimate, LengthControlled

JUDGED = {"greedy": "judge", "sampled": "judge_sampled"}  # decoding -> where totals have what a judge said


@dataclass(frozen=True, slots=True)
class Met:
    """An answer and that of the baseline: rewards, and how many characters ours is longer."""

    prompt_id: str
    decoding: str
    ours: float | None
    theirs: float | None
    longer: int

    @property
    def outcome(self) -> int:
        """1 for a win, 0 for a tie, -1 for a loss. An answer without a reward loses to one that has a reward."""
        ours, theirs = (-float("inf") if reward is None else reward for reward in (self.ours, self.theirs))
        return (ours > theirs) - (ours < theirs)


def totals(answers: Answers, baseline: Baseline, pass_reward: float, out: Path) -> dict[str, Any]:
    """Greedy and sampled answers against those of a baseline, which shares some of their prompts."""
    theirs = baseline.answers()
    differs = baselines.differences(baseline, out)
    met = [pair for rows in answers.shards() for pair in meet(rows, theirs)]
    if not met:
        raise DataError(f"no answer to a prompt of baseline {baseline.directory} is left", "see dropped.parquet")
    by_decoding = {d: [pair for pair in met if pair.decoding == d] for d in measures.DECODINGS}
    greedy = by_decoding["greedy"]
    controlled = statistics.length_controlled([(1 + p.outcome) / 2 for p in greedy], [p.longer for p in greedy])
    return {
        "baseline": baseline.id,
        "round": baseline.manifest["totals"]["round"],
        "policy": baseline.policy,
        "prompts": len({pair.prompt_id for pair in met}),
        **({"differs": differs} if differs else {}),
        **{d: compare(pairs, pass_reward) for d, pairs in by_decoding.items() if pairs},
        "length_controlled": describe(controlled),
    }


def meet(rows: Iterable[Evaluation], theirs: Mapping[Key, Other]) -> list[Met]:
    """The answers that both have, in our order."""
    pairs = ((row, theirs.get((row.prompt_id, row.sample_index))) for row in rows)
    return [
        Met(row.prompt_id, row.decoding, row.reward, other.reward, len(row.text) - other.characters)
        for row, other in pairs
        if other is not None
    ]


def check_shared(baseline: Baseline, prompts: Iterable[Prompt]) -> None:
    """Say how many prompts are shared, where it is not every one. Raises DataError when it is none."""
    ours, theirs = {prompt.prompt_id for prompt in prompts}, baseline.prompt_ids()
    shared = len(ours & theirs)
    if not shared:
        raise DataError(
            f"baseline {baseline.directory} shares no prompt with this evaluation ({len(theirs)} there, {len(ours)} "
            "here)",
            "evaluate both policies on the same prompts",
        )
    if ours != theirs:
        log.warn(
            f"baseline {baseline.directory}: {shared} prompts are shared, of {len(theirs)} there and {len(ours)} here"
        )


def compare(pairs: Sequence[Met], pass_reward: float) -> dict[str, Any]:
    """Wins, ties and losses by reward, and the differences of the pass rate and of the mean reward (ours - theirs).

    p_value: McNemar's exact test for one comparison to a prompt, the sign-flip test for several. The interval of the
    mean reward is a paired bootstrap over prompts.
    """
    by_prompt: dict[str, list[Met]] = defaultdict(list)
    for pair in pairs:
        by_prompt[pair.prompt_id].append(pair)
    groups = list(by_prompt.values())
    passed = [
        [measures.passes(p.ours, pass_reward) - measures.passes(p.theirs, pass_reward) for p in group]
        for group in groups
    ]
    difference = statistics.paired([sum(group) / len(group) for group in passed])
    return {
        **tally([[p.outcome for p in group] for group in groups]),
        **difference.named("difference"),
        "difference_p_value": statistics.sign_flip_p([sum(group) for group in passed]),
        **_reward_difference(groups).named("mean_reward_difference"),
    }


def tally(outcomes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Wins, ties, losses and the win rate (wins and half the ties) with its interval, from the outcomes by prompt."""
    flat = [outcome for group in outcomes for outcome in group]
    rate = statistics.win_rate([sum(group) / len(group) for group in outcomes])
    return {
        "win": flat.count(1),
        "tie": flat.count(0),
        "loss": flat.count(-1),
        **rate.alone("win_rate"),
        "p_value": statistics.sign_flip_p([sum(group) for group in outcomes]),
    }


def describe(fit: LengthControlled) -> dict[str, float]:
    """A length-controlled fit as totals have it."""
    return {**fit.intercept.named("intercept"), **fit.win_rate.named("win_rate"), "slope": fit.slope}


def _reward_difference(groups: Sequence[Sequence[Met]]) -> Estimate:
    """The mean difference of rewards where both answers have one; 0 where none has."""
    rated = [[p.ours - p.theirs for p in g if p.ours is not None and p.theirs is not None] for g in groups]
    rated = [group for group in rated if group]
    if not rated:
        return Estimate(0.0, 0.0, 0.0)
    return Estimate(sum(map(sum, rated)) / sum(map(len, rated)), *statistics.bootstrap(rated))
