"""The maker of pairs without files: prompts without a pair, weights, partitions."""

from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.stages.build_pairs import output_rows, pairs
from tests.stages.build_pairs.runs import Row, frame

ROWS = st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from([0.0, 0.5, 1.0])), max_size=12).map(
    lambda rows: [Row(p, f"{p}{n:02d}", x) for n, (p, x) in enumerate(rows)]
)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from(["best-worst", "correct-wrong"]))
def test_a_prompt_has_pairs_or_one_reason(rows: list[Row], rule: str) -> None:
    config = BuildPairsConfig(rule=rule, correct_reward=0.75 if rule == "correct-wrong" else 0.5)
    found = pairs.apply_rule(frame(rows), config)
    reasons = dict(found.ledger.select("id", "reason").iter_rows())
    counts = Counter(r.prompt_id for r in rows)
    assert found.num_prompts == len(counts)
    assert set(found.pairs["prompt_id"]) | set(reasons) == set(counts)
    assert not set(found.pairs["prompt_id"]) & set(reasons)
    for prompt_id, reason in reasons.items():
        rewards = {r.reward for r in rows if r.prompt_id == prompt_id}
        expected = "too_few" if counts[prompt_id] < 2 else "tie" if len(rewards) == 1 else "no_pair"
        assert reason == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("pqrs"), min_size=1, max_size=12))
def test_weights_have_mean_1_and_prompts_the_same_sum(prompts: list[str]) -> None:
    weighted = output_rows.with_weights(pl.DataFrame({"prompt_id": prompts}), BuildPairsConfig(weight_by="prompt"))
    sums = weighted.group_by("prompt_id").agg(pl.col("weight").sum())["weight"]
    assert weighted["weight"].mean() == pytest.approx(1)
    assert sums.to_list() == pytest.approx([len(prompts) / len(set(prompts))] * len(set(prompts)))
    for config in (BuildPairsConfig(), BuildPairsConfig(rule="all-above-gap", weight_by="pair")):
        assert set(output_rows.with_weights(pl.DataFrame({"prompt_id": prompts}), config)["weight"]) == {1.0}
