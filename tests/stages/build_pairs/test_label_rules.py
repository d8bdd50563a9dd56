"""Label rules against plain Python, and the class weights of KTO by hand."""

import random
import statistics
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.stages.build_pairs import label_rules
from tests.stages.build_pairs.runs import Row, frame

ROWS = st.lists(
    st.tuples(
        st.sampled_from("pqr"), st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.5]), st.sampled_from(["stop", "length"])
    ), min_size=1, max_size=16,
).map(lambda rows: [Row(p, f"{p}{n:02d}", x, "t", f) for n, (p, x, f) in enumerate(rows)])  # fmt: skip
Verdict = tuple[bool, str | None]


def against(value: float, middle: float) -> Verdict:
    return value > middle, "tie" if value == middle else None


def quantile(values: list[float], share: float, up: bool) -> float:
    place = share * (len(values) - 1)
    below = int(place)
    return sorted(values)[min(below + (1 if up and place > below else 0), len(values) - 1)]


def oracle(row: Row, rows: list[Row], rule: str) -> Verdict:
    x = row.reward or 0.0
    own = [r.reward or 0.0 for r in rows if r.prompt_id == row.prompt_id]
    everything = [r.reward or 0.0 for r in rows]
    if rule == "quantile":
        low, high = x <= quantile(everything, 0.25, up=False), x >= quantile(everything, 0.75, up=True)
        return high, None if low != high else "dead_zone"
    rules: dict[str, Callable[[], Verdict]] = {
        "mean": lambda: against(x, sum(own) / len(own)),
        "median": lambda: against(x, statistics.median(own)),
        "threshold": lambda: (x >= 0.5, None),
        "thumbs": lambda: (x > 0, "dead_zone" if x == 0 else None),
    }
    return rules[rule]()


@pytest.mark.parametrize("rule", ["mean", "median", "threshold", "quantile", "thumbs"])
@settings(deadline=None, max_examples=40)
@given(rows=ROWS, cut=st.booleans(), source=st.randoms(use_true_random=False))
def test_labels_equal_the_oracle_in_any_order(rule: str, rows: list[Row], cut: bool, source: random.Random) -> None:
    choice: dict[str, Any] = {
        "truncated_chosen": "drop" if cut else "keep",
        "truncated_rejected": "drop" if cut else "keep",
    }
    config = BuildPairsConfig(output="labels", label_rule=rule, **choice)  # type: ignore[arg-type]
    judged = label_rules.by_reward(frame(source.sample(rows, len(rows))), config)
    found = {i: (label, why) for i, label, why in judged.select("completion_id", "label", "reason").iter_rows()}
    assert len(found) == len(rows)
    for row in rows:
        label, why = oracle(row, rows, rule)
        if why is None and cut and row.finish_reason == "length":
            why = "truncated_chosen" if label else "truncated_rejected"
        assert found[row.completion_id][1] == why
        if why is None:
            assert found[row.completion_id][0] is label


def test_from_pairs_both_sides_and_no_side() -> None:
    """a > b, b > c, d alone: a desirable, c undesirable, b contradicts itself, d is unused."""
    pairs = pl.DataFrame({"chosen_completion_id": ["a", "b"], "rejected_completion_id": ["b", "c"]})
    judged = label_rules.from_pairs(pairs, frame([Row("p", i, 1.0) for i in "dcba"]))
    assert judged.select("completion_id", "label", "reason").rows() == [
        ("a", True, None), ("b", True, "contradiction"), ("c", False, None), ("d", False, "unused"),
    ]  # fmt: skip


def test_equal_texts_with_different_labels_contradict() -> None:
    labels = pl.DataFrame(
        {
            "prompt_id": ["p", "p", "p", "q"], "completion_id": ["a", "b", "c", "d"], "text": ["x ", "x", "y", "x"],
            "label": [True, False, True, False],
        }
    )  # fmt: skip
    assert label_rules.by_content(labels)["reason"].to_list() == ["contradiction", "contradiction", None, None]


@pytest.mark.parametrize(
    ("desirable", "undesirable", "weights"),
    [
        (100, 100, (1, 1)),
        (150, 100, (1, 1)),
        (100, 150, (1.875, 1)),
        (300, 100, (1, 2.4)),
        (10, 90, (11.25, 1)),
        (5, 0, (1, 1)),
    ],
)
def test_balance_brings_the_weighted_ratio_into_1_to_1_5(
    desirable: int, undesirable: int, weights: tuple[float, float]
) -> None:
    """Outside [1, 3/2] the ratio becomes 1.25: 100 x 1.875 / 150, 300 / (100 x 2.4), 10 x 11.25 / 90."""
    found = label_rules.balance(desirable, undesirable)
    assert (found.desirable_weight, found.undesirable_weight) == pytest.approx(weights)
    if undesirable:
        ratio = desirable * found.desirable_weight / (undesirable * found.undesirable_weight)
        assert 1 <= ratio <= 1.5
        assert min(weights) == 1
