"""Every rule fires on a recorded series that calls for it, and is silent on one close to it that does not."""

from dataclasses import dataclass
from typing import Any, get_args

import pytest

from prefpipe.config.stops import StopRule, StopSettings
from prefpipe.stages.iterate import stops
from prefpipe.stages.iterate.stops import Series


def evaluation(
    passed: float, half: float = 0.04, words: float = 20.0, degenerate: float = 0.05, **more: Any
) -> dict[str, Any]:
    """The totals of an evaluation; `half` is half the width of the 95 % interval of its pass rates."""
    one = {"pass": passed, "low": passed - half, "high": passed + half, "mean_reward": passed}
    both = {**one, "mean_words": words, "degenerate": degenerate}
    return {"prompts": 80, "greedy": dict(both), "sampled": dict(both), **more}


def built(mixed: float, prompts: int = 100) -> dict[str, Any]:
    """The totals of build-pairs: of so many prompts this share gave pairs."""
    return {"prompts": prompts, "pairs": 9, "levels": {"prompts": {"in": prompts, "out": round(mixed * prompts)}}}


@dataclass(frozen=True)
class Case:
    """Two recorded runs that differ in what one rule looks at; `at`: the round after which it fires on the first."""

    rule: StopRule
    fires: list[dict[str, Any]]
    silent: list[dict[str, Any]]
    at: int
    why: str
    mixed: tuple[float, float] = (0.6, 0.6)  # share of mixed prompts in the last round, where it fires and where not


def drops(*, failed: bool) -> list[dict[str, Any]]:
    return [
        {"prompts": "chat.jsonl", "reward": "r", "drops": [{"baseline": "x", "difference": -0.2, "failed": failed}]}
    ]


def nats(k1: float) -> list[dict[str, Any]]:
    return [{"to": "base", "per_token": {"k1": 0.1, "k3": 0.1}, "per_sequence": {"k1": k1, "k3": 9999.0}}]


UP = [evaluation(0.1), evaluation(0.3), evaluation(0.5)]
CASES = [
    Case("gain", [*UP, evaluation(0.51), evaluation(0.505)], [*UP, evaluation(0.51), evaluation(0.6)], 4, "round 4"),
    Case("gain", [*UP, evaluation(0.4), evaluation(0.45)], [*UP, evaluation(0.4)], 4, "-0.05 over round 2"),
    Case("mixed", UP, UP, 2, "19.0% of the prompts", (0.19, 0.2)),
    Case("kl", [*UP, evaluation(0.7, kl=nats(10.5))], [*UP, evaluation(0.7, kl=nats(9.5))], 3, "10.50 nats from base"),
    Case("length", [*UP, evaluation(0.7, words=40.1)], [*UP, evaluation(0.7, words=39.9)], 3, "40.1 words"),
    Case("length", [*UP, evaluation(0.7, words=4.9)], [*UP, evaluation(0.7, words=5.1)], 3, "before training 20.0"),
    Case("degenerate", [*UP, evaluation(0.7, degenerate=0.26)], [*UP, evaluation(0.7, degenerate=0.24)], 3, "26.0%"),
    Case("guard", [*UP, evaluation(0.7, guards=drops(failed=True))], [*UP, evaluation(0.7, guards=drops(failed=False))],
         3, "chat.jsonl"),
    Case("guard", [*UP, evaluation(0.7, perplexity={"text": "t", "drops": [{"failed": True}]})],
         [*UP, evaluation(0.7, perplexity={"text": "t", "drops": [{"failed": False}]})], 3, "perplexity of t"),
]  # fmt: skip


def of(evaluations: list[dict[str, Any]], built: list[dict[str, Any]], metric: str, every: int = 1) -> Series:
    """Evaluations of every so many rounds."""
    return Series([{**totals, "round": every * place} for place, totals in enumerate(evaluations)], built, metric)


def series(evaluations: list[dict[str, Any]], mixed: float = 0.6) -> Series:
    built_rounds = [built(0.6)] * (len(evaluations) - 2) + [built(mixed)]
    return of(evaluations, built_rounds if len(evaluations) > 1 else [], "sampled.pass")


@pytest.mark.parametrize("case", CASES, ids=[f"{case.rule}-{number}" for number, case in enumerate(CASES)])
def test_a_rule_fires_when_it_should_and_not_before(case: Case) -> None:
    for end in range(1, len(case.fires)):
        assert stops.check(series(case.fires[:end]), StopSettings()) is None
    stop = stops.check(series(case.fires, case.mixed[0]), StopSettings())
    assert stop is not None
    assert (stop.rule, stop.round) == (case.rule, case.at)
    assert case.why in stop.why[-1]
    assert stop.advice
    assert stops.check(series(case.silent, case.mixed[1]), StopSettings()) is None


@pytest.mark.parametrize("case", CASES, ids=[f"{case.rule}-{number}" for number, case in enumerate(CASES)])
def test_a_rule_that_is_not_asked_for_is_silent(case: Case) -> None:
    others = tuple(rule for rule in get_args(StopRule) if rule != case.rule)
    assert stops.check(series(case.fires, case.mixed[0]), StopSettings(rules=others)) is None


@pytest.mark.parametrize("rule", get_args(StopRule))
def test_a_longer_window_waits_for_as_many_rounds_in_a_row(rule: StopRule) -> None:
    case = next(case for case in CASES if case.rule == rule)
    longer = StopSettings.model_validate({"rules": [rule], f"{rule}_rounds": StopSettings().gain_rounds + 1})
    recorded, shares = list(case.fires), [built(0.6)] * (len(case.fires) - 2) + [built(case.mixed[0])]
    assert stops.check(of(recorded, shares, "sampled.pass"), longer) is None
    for _ in range(longer.gain_rounds + 1):
        recorded.append(recorded[-1])
        shares.append(shares[-1])
    stop = stops.check(of(recorded, shares, "sampled.pass"), longer)
    assert stop is not None
    assert len(stop.why) == 3


PAIRED = {"difference_low": 0.01, "difference_high": 0.03,
          "mean_reward_difference_low": 0.01, "mean_reward_difference_high": 0.03}  # fmt: skip


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("metric", ["sampled.pass", "greedy.mean_reward"])
def test_the_error_of_a_paired_comparison_is_that_of_the_comparison(metric: str, older: bool) -> None:
    """Paired, a gain of 0.02 is visible; from two intervals as wide as 0.08 it is not. An older version named the
    directory of the baseline."""
    wide = {"mean_reward_low": 0.46, "mean_reward_high": 0.54}
    start, after = evaluation(0.50), evaluation(0.52)
    for totals in (start, after):
        for decoding in ("greedy", "sampled"):
            totals[decoding] |= wide
    one_round = StopSettings(rules=("gain",), gain_rounds=1)
    assert stops.check(of([start, after], [built(0.6)], metric), one_round) is not None
    after["comparisons"] = [
        {**({"baseline": f"runs/x/round-{n}/evaluate"} if older else {"baseline": "ab", "round": n}), "sampled": p,
         "greedy": p} for n, p in ((1, {}), (0, PAIRED))
    ]  # fmt: skip
    assert stops.check(of([start, after], [built(0.6)], metric), one_round) is None


def test_a_mean_reward_without_an_interval_says_nothing_about_a_gain() -> None:
    """As in evaluations that were made before means had one."""
    flat = [evaluation(0.5)] * 4
    assert stops.check(of(flat, [built(0.6)] * 3, "sampled.mean_reward"), StopSettings()) is None


def test_rules_look_at_evaluated_rounds_and_at_all_that_was_built_since_the_one_before() -> None:
    """Evaluations after rounds 0, 2 and 4: of the prompts of rounds 3 and 4 together 20 % are mixed, then fewer."""
    flat = [evaluation(0.5)] * 3
    stop = stops.check(of(flat, [built(0.6)] * 4, "sampled.pass", every=2), StopSettings(rules=("gain",)))
    assert stop is not None
    assert (stop.round, [line.partition(":")[0] for line in stop.why]) == (4, ["round 2", "round 4"])
    assert stop.why[1].startswith("round 4: sampled.pass +0 over round 0")
    rule = StopSettings(rules=("mixed",))
    for last, fires in ((0.4, False), (0.38, True)):
        shares = [built(0.0), built(0.9), built(0.0), built(last)]
        assert (stops.check(of(flat, shares, "sampled.pass", every=2), rule) is not None) == fires


@pytest.mark.parametrize(
    ("totals", "share"),
    [
        (built(0.25), 0.25),
        ({"groups": 10, "prompts": 40}, 0.25),
        ({"labels": 10, "prompts": 40, "levels": {"labels": {"in": 9, "out": 9}}}, None),
        ({"labels": 10, "mixed_prompts": 2, "prompts": 40, "levels": {"labels": {"in": 9, "out": 9}}}, 0.05),
        ({"labels": 10, "mixed_prompts": 0, "prompts": 40, "levels": {}}, 0.0),
        ({"levels": {"prompts": {"in": 0, "out": 0}}}, None),
    ],
)
def test_the_share_of_mixed_prompts_is_that_of_every_output(totals: dict[str, Any], share: float | None) -> None:
    assert stops.mixed_share([totals]) == share
