"""Every pair rule against a slow oracle in plain Python, under any order of rows."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.build_pairs import RULES, BuildPairsConfig
from prefpipe.ids import sample_seed
from prefpipe.stages.build_pairs.pair_rules import draw, find, pair_frame, rank
from tests.conftest import ROOT
from tests.stages.build_pairs.runs import Row, fitting, frame

Pairs = list[tuple[Row, Row]]
# Rewards are multiples of 1/4, so that sums and differences are exact.
ROWS = st.lists(
    st.tuples(st.sampled_from("pqr"), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.25, -1.5]), st.integers(1, 6)),
    max_size=18,
).map(lambda rows: [Row(p, f"{p}{n:02d}", x, num_tokens=t) for n, (p, x, t) in enumerate(rows)])
CONFIGS = st.fixed_dictionaries(
    {
        "pairs_per_prompt": st.sampled_from([0, 1, 2, 5]),
        "rule_gap": st.sampled_from([0.0, 0.25, 0.75]),
        "top_k": st.integers(1, 3),
        "correct_reward": st.sampled_from([0.25, 0.5, 3.0, -2.0]),
        "max_length_difference": st.sampled_from([0, 1, 3]),
        "seed": st.integers(0, 3),
    }
)


def reward(row: Row) -> float:
    assert row.reward is not None
    return row.reward


def ordered(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda r: (-reward(r), r.completion_id))


def some(pairs: Pairs, config: BuildPairsConfig) -> Pairs:
    """pairs_per_prompt of them at random; the draw is the n-th of what is left, n from (seed, prompt_id, turn)."""
    count = config.pairs_per_prompt or len(pairs)
    if count >= len(pairs):
        return pairs
    left, found = list(range(len(pairs))), list[int]()
    for turn in range(count):
        found.append(left.pop(sample_seed(config.seed, pairs[0][0].prompt_id, turn) % len(left)))
    return [pairs[i] for i in sorted(found)]


def first(pairs: Pairs, config: BuildPairsConfig) -> Pairs:
    return pairs[: config.pairs_per_prompt or None]


def gap(pair: tuple[Row, Row]) -> float:
    return reward(pair[0]) - reward(pair[1])


def best_worst(own: list[Row], config: BuildPairsConfig) -> Pairs:
    own, found = list(own), []
    while len(own) >= 2:
        found.append((own.pop(0), own.pop()))
    return first([p for p in found if gap(p) > 0], config)


def best_random_worse(own: list[Row], config: BuildPairsConfig) -> Pairs:
    worse = [(own[0], r) for r in own if reward(r) < reward(own[0])]
    if config.pairs_per_prompt == 1 and worse:
        return [worse[sample_seed(config.seed, own[0].prompt_id, 0) % len(worse)]]
    return some(worse, config)


def best_worst_of_5(own: list[Row], config: BuildPairsConfig) -> Pairs:
    five = draw(config.seed, own[0].prompt_id, len(own), 5)
    pair = (own[0], own[max(five)])
    return [pair] if gap(pair) > 0 else []


def best_sigma(own: list[Row], config: BuildPairsConfig) -> Pairs:
    mean = sum(map(reward, own)) / len(own)
    target = mean - 2 * math.sqrt(sum((reward(r) - mean) ** 2 for r in own) / len(own))
    worse = [r for r in own if reward(r) < reward(own[0])]
    # rounding may differ in the last bit: near ties of the distance are one distance
    near = sorted(worse, key=lambda r: (round(abs(reward(r) - target), 9), own.index(r)))
    return first([(own[0], r) for r in near], config)


def all_above_gap(own: list[Row], config: BuildPairsConfig) -> Pairs:
    pairs = [p for p in itertools.combinations(own, 2) if gap(p) > 0 and gap(p) >= config.rule_gap]
    return some(pairs, config)


def top_bottom(own: list[Row], config: BuildPairsConfig) -> Pairs:
    k = min(config.top_k, len(own) // 2)
    pairs = list(itertools.product(own[:k], own[len(own) - k :]))
    return some([p for p in pairs if gap(p) > 0], config)


def correct_wrong(own: list[Row], config: BuildPairsConfig) -> Pairs:
    correct = [r for r in own if reward(r) >= config.correct_reward]
    return some(list(itertools.product(correct, own[len(correct) :])), config)


def longest_correct(own: list[Row], config: BuildPairsConfig) -> Pairs:
    correct = [r for r in own if reward(r) >= config.correct_reward]
    if not correct:
        return []
    longest = max(correct, key=lambda r: (r.num_tokens, -own.index(r)))
    return some([(longest, r) for r in own[len(correct) :]], config)


def smallest_gap(own: list[Row], config: BuildPairsConfig) -> Pairs:
    pairs = [p for p in itertools.combinations(own, 2) if gap(p) > 0 and gap(p) >= config.rule_gap]
    return first(sorted(pairs, key=lambda p: (gap(p), own.index(p[0]), own.index(p[1]))), config)


def length_controlled(own: list[Row], config: BuildPairsConfig) -> Pairs:
    def apart(pair: tuple[Row, Row]) -> int:
        return abs(pair[0].num_tokens - pair[1].num_tokens)

    cap = config.max_length_difference or 10**9
    pairs = [p for p in itertools.combinations(own, 2) if gap(p) > 0 and apart(p) <= cap]
    key = lambda p: (-gap(p), p[0].num_tokens, apart(p), own.index(p[0]), own.index(p[1]))  # noqa: E731
    return first(sorted(pairs, key=key), config)


ORACLES: dict[str, Callable[[list[Row], BuildPairsConfig], Pairs]] = {
    "best-worst": best_worst, "best-random-worse": best_random_worse, "best-worst-of-5": best_worst_of_5,
    "best-sigma": best_sigma, "all-above-gap": all_above_gap, "top-bottom": top_bottom, "correct-wrong": correct_wrong,
    "longest-correct": longest_correct, "smallest-gap": smallest_gap, "length-controlled": length_controlled,
}  # fmt: skip


def expected(rows: Sequence[Row], config: BuildPairsConfig) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for prompt_id in {r.prompt_id for r in rows}:
        own = ordered([r for r in rows if r.prompt_id == prompt_id])
        found |= {(c.completion_id, r.completion_id) for c, r in ORACLES[config.rule](own, config)}
    return found


def found(rows: Sequence[Row], config: BuildPairsConfig) -> pl.DataFrame:
    ranked = rank(frame(rows))
    return pair_frame(ranked, find(config.rule)(ranked, config))


def config(rule: str, **changes: Any) -> BuildPairsConfig:
    return BuildPairsConfig.model_validate(fitting({"rule": rule, **changes}))


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=40)
@given(rows=ROWS, changes=CONFIGS, source=st.randoms(use_true_random=False))
def test_a_rule_equals_its_oracle_in_any_order_of_rows(
    rule: str, rows: list[Row], changes: dict[str, Any], source: random.Random
) -> None:
    asked = config(rule, **changes)
    shuffled = source.sample(rows, len(rows))
    pairs = found(shuffled, asked)
    ids = list(zip(pairs["chosen_completion_id"], pairs["rejected_completion_id"], strict=True))
    assert len(set(ids)) == len(ids)
    assert set(ids) == expected(rows, asked)
    assert (pairs["reward_gap"] > 0).all()
    by_id = {r.completion_id: r for r in rows}
    for row in pairs.iter_rows(named=True):
        for side in ("chosen", "rejected"):
            own = by_id[row[f"{side}_completion_id"]]
            assert (row["prompt_id"], row[f"{side}_reward"], row[f"{side}_num_tokens"]) == (
                own.prompt_id, own.reward, own.num_tokens,
            )  # fmt: skip


def test_every_rule_has_an_oracle() -> None:
    assert set(RULES) == set(ORACLES)


@pytest.mark.parametrize("rule", RULES)
def test_no_candidates_and_ties_make_no_pair(rule: str) -> None:
    asked = config(rule, rule_gap=0.0, correct_reward=0.5)
    assert found([], asked).is_empty()
    assert found([Row("p", f"p{n}", 1.0) for n in range(5)], asked).is_empty()
    assert found([Row("p", "p0", 1.0)], asked).is_empty()


def test_best_worst_by_hand() -> None:
    """Rewards 5 4 3 2 1: (5, 1), (4, 2), and the middle one stays alone, however many pairs are allowed."""
    rows = [Row("p", f"c{n}", float(n)) for n in (3, 1, 5, 2, 4)]
    for allowed, by_hand in ((1, [(5, 1)]), (2, [(5, 1), (4, 2)]), (9, [(5, 1), (4, 2)]), (0, [(5, 1), (4, 2)])):
        pairs = found(rows, config("best-worst", pairs_per_prompt=allowed))
        assert list(zip(pairs["chosen_reward"], pairs["rejected_reward"], strict=True)) == by_hand


def test_best_random_worse_draws_all_worse_ones_about_equally() -> None:
    """400 prompts with rewards 3 3 2 1 0: rejected is one of the last three, each about 133 times (sd 9.4)."""
    rows = [Row(f"p{p}", f"p{p}/{n}", x) for p in range(400) for n, x in enumerate((3.0, 3.0, 2.0, 1.0, 0.0))]
    pairs = found(rows, config("best-random-worse"))
    assert set(pairs["chosen_reward"]) == {3.0}
    counts = dict(pairs.group_by("rejected_reward").len().iter_rows())
    assert set(counts) == {2.0, 1.0, 0.0}
    assert all(abs(n - 400 / 3) < 5 * 9.4 for n in counts.values())
    other = found(rows, config("best-random-worse", seed=1))
    assert other["rejected_completion_id"].to_list() != pairs["rejected_completion_id"].to_list()


def test_sigma_takes_the_worst_of_few_and_not_the_outlier_of_many() -> None:
    """Of 8 rewards the one nearest to mean - 2 sd is (nearly) the worst; one far outlier of 101 is not taken.

    1 x -10, 100 x (0 or 1 alternating): mean 0.396, sd 1.15, target -1.9: 0 is nearer (1.9) than -10 (8.1).
    """
    few = [Row("p", f"p{n}", float(n)) for n in range(8)]
    assert found(few, config("best-sigma"))["rejected_reward"].to_list() == [0.0]
    many = [Row("p", "out", -10.0), *(Row("p", f"p{n}", float(n % 2)) for n in range(100))]
    assert found(many, config("best-sigma"))["rejected_reward"].to_list() == [0.0]
    assert found(many, config("best-worst"))["rejected_reward"].to_list() == [-10.0]


def test_worst_of_5_is_not_the_worst_of_many() -> None:
    """The worst of 5 of 1,000 uniform ranks lies at 5/6 on average: the worst of all is hit once in 200."""
    rows = [Row(f"p{p}", f"p{p}/{n:04d}", float(-n)) for p in range(40) for n in range(1000)]
    ranks = -found(rows, config("best-worst-of-5"))["rejected_reward"]
    assert 0.7 < ranks.mean() / 1000 < 0.95  # type: ignore[operator]
    assert (ranks == 999).sum() <= 3


def test_length_controlled_by_hand() -> None:
    """Two best (10 and 4 tokens), two worst (9 and 5): the short best with the worst that is 1 away, not 5."""
    rows = [
        Row("p", "a", 1.0, num_tokens=10), Row("p", "b", 1.0, num_tokens=4), Row("p", "c", 0.5, num_tokens=4),
        Row("p", "d", 0.0, num_tokens=9), Row("p", "e", 0.0, num_tokens=5),
    ]  # fmt: skip
    pairs = found(rows, config("length-controlled"))
    assert pairs.select("chosen_completion_id", "rejected_completion_id").rows() == [("b", "e")]
    pairs = found([r for r in rows if r.completion_id != "e"], config("length-controlled", max_length_difference=2))
    assert pairs.select("chosen_completion_id", "rejected_completion_id").rows() == [("a", "d")]


def test_draws_are_without_replacement_and_repeat() -> None:
    assert sorted(draw(0, "p", 6, 9)) == list(range(6))
    assert draw(3, "p", 100, 4) == draw(3, "p", 100, 4)
    assert len(set(draw(3, "p", 100, 4))) == 4
    assert draw(3, "p", 100, 4)[:1] == draw(3, "p", 100, 1)


def test_every_rule_has_its_page() -> None:
    page = (ROOT / "docs" / "pair-rules.md").read_text()
    assert [line.split()[1] for line in page.splitlines() if line.startswith("### ")][:1] == ["best-random-worse"]
    assert {line.split()[1] for line in page.splitlines() if line.startswith("### ")} == set(RULES)
