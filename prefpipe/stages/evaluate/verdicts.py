"""A judge between the answers of a policy and those of a baseline: verdicts/KEY has what it said of greedy answers,
another one what it said of sampled ones.

A row is a reward of our answer: 1 for winning in both orders, 0 for losing both, 0.5 for anything else. `detail` has
the two verdicts: with ours shown first, then with theirs shown first.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

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
from prefpipe.stages.evaluate.measures import DECODINGS

_OUTCOMES = {("first", "second"): 1, ("second", "first"): -1, ("tie", "tie"): 0}  # verdicts that agree
_SEPARATOR = ", "


class _Verdict(NamedTuple):
    """The two verdicts on a pair, None where one is missing, and how many characters ours is longer."""

    prompt_id: str
    picks: tuple[str, str] | None
    longer: int


@dataclass(frozen=True)
class Court:
    """A judge of pairs, by the name of its table."""

    name: str
    settings: Judge
    identity: str
    ask: Ask
    decodings: tuple[str, ...] = ("greedy",)

    @property
    def identities(self) -> dict[str, str]:
        """What its verdicts depend on beside the answers, for each decoding that it judges."""
        return {f"judge {' '.join([self.name, *_beside_greedy(d)])}": self.identity for d in self.decodings}

    def dataset(self, baseline: Baseline, decoding: str) -> str:
        """Where its verdicts on a baseline stand."""
        return f"verdicts/{key(self.identity, baseline.answers_id, *_beside_greedy(decoding))}"


def read(config: EvaluateConfig) -> Court | None:
    """The judge of a run, if it has one."""
    settings = config.reward_settings.get(config.judge)
    if not isinstance(settings, Judge):
        return None
    identity = rewards.identity(config.judge, config.reward_settings)
    decodings = DECODINGS if config.judge_on == "all" else (config.judge_on,)
    return Court(config.judge, settings, identity, judge.asker(settings), decodings)


def fill(config: EvaluateConfig, answers: Answers, court: Court, baselines: Sequence[Baseline]) -> None:
    """Ask for every pair of answers that is not judged yet, a shard at a time."""
    for baseline, decoding in product(baselines, court.decodings):
        _fill(config, answers, court, baseline, decoding)


def totals(answers: Answers, court: Court, baseline: Baseline) -> dict[str, Any]:
    """Wins, ties and losses by the judge, as by reward, under the name of each decoding in comparisons.JUDGED."""
    theirs = baseline.answers()
    return {
        comparisons.JUDGED[d]: _tally(court, list(_read(answers, court.dataset(baseline, d), theirs)))
        for d in court.decodings
    }


def _tally(court: Court, rows: Sequence[_Verdict]) -> dict[str, Any]:
    """Only pairs with the same verdict in both orders count. At equal length a prompt has the mean of its pairs.

    order_bias: how often the first answer was better, and how often the winner changed with the order.
    """
    whole = [(row, row.picks) for row in rows if row.picks is not None]
    by_prompt: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row, picks in whole:
        if picks in _OUTCOMES:
            by_prompt[row.prompt_id].append((_OUTCOMES[picks], row.longer))
    judged = list(by_prompt.values())
    result: dict[str, Any] = {
        "name": court.name,
        "judged": len(rows),
        "inconsistent": len(whole) - sum(map(len, judged)),
        "without_verdict": len(rows) - len(whole),
        "order_bias": judge.bias([Comparison(None, picks, None) for _, picks in whole]),
    }
    if judged:
        outcomes, gaps = ([_mean([pair[i] for pair in pairs]) for pairs in judged] for i in (0, 1))
        fit = statistics.length_controlled([(1 + outcome) / 2 for outcome in outcomes], gaps)
        result |= comparisons.tally([[outcome for outcome, _ in pairs] for pairs in judged])
        result["length_controlled"] = comparisons.describe(fit)
    return result


def _fill(config: EvaluateConfig, answers: Answers, court: Court, baseline: Baseline, decoding: str) -> None:
    dataset = court.dataset(baseline, decoding)
    missing = answers.lacking(dataset)
    texts = baseline.texts(config.reward_on, greedy=decoding == "greedy") if missing else {}
    for index, answered in answers.with_prompts(missing):
        met = [pair for pair in answered if _place(pair[1]) in texts]
        ours = to_rate(config, answers.task, met)
        theirs = [replace(a, text=texts[_place(row)]) for a, (_, row) in zip(ours, met, strict=True)]
        found = judge.compare(court.settings, court.ask, ours, theirs)
        problems = [c.problem.detail for c in found if c.problem is not None and c.problem.status == "crash"]
        if found and len(problems) == len(found):
            raise DataError(f"judge {court.name} failed on all {len(found)} pairs: {problems[0]}", "check its settings")
        rows = [_row(court.name, row, comparison) for (_, row), comparison in zip(met, found, strict=True)]
        answers.run.write_part(dataset, Reward, index, to_table(Reward, rows), answers.rows_of(index))


def _read(answers: Answers, dataset: str, theirs: dict[Key, Other]) -> Iterator[_Verdict]:
    for index in range(answers.num_shards):
        rows = {row.completion_id: row for row in answers.rows(index)}
        for said in from_table(Reward, answers.run.read_part(dataset, Reward, index)):
            ours = rows[said.completion_id]
            forth, _, back = (said.detail or "").partition(_SEPARATOR)
            picks = (forth, back) if said.status == "ok" else None
            yield _Verdict(ours.prompt_id, picks, len(ours.text) - theirs[_place(ours)].characters)


def _place(row: Evaluation) -> Key:
    return row.prompt_id, row.sample_index


def _beside_greedy(decoding: str) -> tuple[str, ...]:
    """What tells verdicts on other answers from those on greedy ones, which were all there was once."""
    return () if decoding == "greedy" else (decoding,)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _row(name: str, row: Evaluation, comparison: Comparison) -> Reward:
    problem = comparison.problem
    if problem is not None:
        return Reward(row.completion_id, name, None, problem.status, problem.detail)
    return Reward(row.completion_id, name, comparison.left_score, "ok", _SEPARATOR.join(map(str, comparison.picks)))
