"""A judge between the greedy answers of a policy and those of a baseline: verdicts/KEY has what it said.

A row is a reward of our answer: 1 for winning in both orders, 0 for losing both, 0.5 for anything else. `detail` has
the two verdicts: with ours shown first, then with theirs shown first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefpipe import rewards, statistics
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.judge import Judge
from prefpipe.errors import DataError
from prefpipe.rewards import judge
from prefpipe.rewards.judge import Ask, Comparison
from prefpipe.schemas import Evaluation, Reward, from_table, to_table
from prefpipe.stages.evaluate import comparisons
from prefpipe.stages.evaluate.answers import Answers, key, to_rate
from prefpipe.stages.evaluate.baselines import Baseline, Key, Other

_OUTCOMES = {("first", "second"): 1, ("second", "first"): -1, ("tie", "tie"): 0}  # verdicts that agree
_SEPARATOR = ", "


Picks = tuple[str, str]


@dataclass(frozen=True)
class Court:
    """A judge of pairs, by the name of its table."""

    name: str
    settings: Judge
    identity: str
    ask: Ask

    def dataset(self, baseline: Baseline) -> str:
        """Where its verdicts on a baseline stand."""
        return f"verdicts/{key(self.identity, baseline.answers_id)}"


def read(config: EvaluateConfig) -> Court | None:
    """The judge of a run, if it has one."""
    settings = config.reward_settings.get(config.judge)
    if not isinstance(settings, Judge):
        return None
    return Court(config.judge, settings, rewards.identity(config.judge, config.reward_settings), judge.asker(settings))


def fill(config: EvaluateConfig, answers: Answers, court: Court, baselines: Sequence[Baseline]) -> None:
    """Ask for every pair of greedy answers that is not judged yet, a shard at a time."""
    for baseline in baselines:
        _fill(config, answers, court, baseline)


def totals(answers: Answers, court: Court, baseline: Baseline) -> dict[str, Any]:
    """Wins, ties and losses by the judge, as by reward; only pairs with the same verdict in both orders count.

    order_bias: how often the first answer was better, and how often the winner changed with the order.
    """
    rows = list(_read(answers, court.dataset(baseline), baseline.answers()))
    whole = [(picks, longer) for picks, longer in rows if picks is not None]
    judged = [(_OUTCOMES[picks], longer) for picks, longer in whole if picks in _OUTCOMES]
    result: dict[str, Any] = {
        "name": court.name,
        "judged": len(rows),
        "inconsistent": len(whole) - len(judged),
        "without_verdict": len(rows) - len(whole),
        "order_bias": judge.bias([Comparison(None, picks, None) for picks, _ in whole]),
    }
    if judged:
        fit = statistics.length_controlled([(1 + outcome) / 2 for outcome, _ in judged], [gap for _, gap in judged])
        result |= comparisons.tally([[outcome] for outcome, _ in judged])
        result["length_controlled"] = comparisons.describe(fit)
    return result


def _fill(config: EvaluateConfig, answers: Answers, court: Court, baseline: Baseline) -> None:
    dataset = court.dataset(baseline)
    missing = answers.lacking(dataset)
    texts = baseline.greedy_texts(config.reward_on) if missing else {}
    for index, answered in answers.with_prompts(missing):
        met = [pair for pair in answered if pair[1].decoding == "greedy" and pair[1].prompt_id in texts]
        ours = to_rate(config, answers.task, met)
        theirs = [replace(a, text=texts[row.prompt_id]) for a, (_, row) in zip(ours, met, strict=True)]
        found = judge.compare(court.settings, court.ask, ours, theirs)
        problems = [c.problem.detail for c in found if c.problem is not None and c.problem.status == "crash"]
        if found and len(problems) == len(found):
            raise DataError(f"judge {court.name} failed on all {len(found)} pairs: {problems[0]}", "check its settings")
        rows = [_row(court.name, row, comparison) for (_, row), comparison in zip(met, found, strict=True)]
        answers.run.write_part(dataset, Reward, index, to_table(Reward, rows), answers.rows_of(index))


def _read(answers: Answers, dataset: str, theirs: dict[Key, Other]) -> Iterator[tuple[Picks | None, int]]:
    """The two verdicts on every pair, None where one is missing, and how many characters ours is longer."""
    for index in range(answers.num_shards):
        rows = {row.completion_id: row for row in answers.rows(index)}
        for said in from_table(Reward, answers.run.read_part(dataset, Reward, index)):
            ours = rows[said.completion_id]
            forth, _, back = (said.detail or "").partition(_SEPARATOR)
            picks = (forth, back) if said.status == "ok" else None
            yield picks, len(ours.text) - theirs[ours.prompt_id, 0].characters


def _row(name: str, row: Evaluation, comparison: Comparison) -> Reward:
    problem = comparison.problem
    if problem is not None:
        return Reward(row.completion_id, name, None, problem.status, problem.detail)
    return Reward(row.completion_id, name, comparison.left_score, "ok", _SEPARATOR.join(map(str, comparison.picks)))
