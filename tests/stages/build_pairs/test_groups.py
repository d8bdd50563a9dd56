"""Ranked groups: distinct rewards and texts, best first, against plain Python."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.runs import store
from prefpipe.schemas import RankedGroup, from_table
from prefpipe.stages.build_pairs import groups
from tests.stages.build_pairs.runs import Row, build, frame, ids_of, ledger_of, logps_of, run_of

ROWS = st.lists(
    st.tuples(st.sampled_from("pq"), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from(["stop", "length"])),
    max_size=12,
).map(lambda rows: [Row(p, f"{p}{n:02d}", x, "t", f) for n, (p, x, f) in enumerate(rows)])


def oracle(rows: list[Row], chosen: str, rejected: str) -> dict[str, str | None]:
    reasons: dict[str, str | None] = {}
    for prompt_id in {r.prompt_id for r in rows}:
        own = sorted((r for r in rows if r.prompt_id == prompt_id), key=lambda r: (-(r.reward or 0), r.completion_id))
        distinct: list[Row] = []
        for row in own:
            if distinct and distinct[-1].reward == row.reward:
                reasons[row.completion_id] = "tie"
            else:
                distinct.append(row)
        left: list[Row] = []
        for place, row in enumerate(distinct):
            last = place == len(distinct) - 1
            if row.finish_reason == "length" and (rejected if last else chosen) == "drop":
                reasons[row.completion_id] = "truncated_rejected" if last else "truncated_chosen"
            else:
                left.append(row)
        for row in left:
            reasons[row.completion_id] = "too_few" if len(left) == 1 else None
    return reasons


@settings(deadline=None, max_examples=80)
@given(ROWS, st.sampled_from(["drop", "keep"]), st.sampled_from(["drop", "keep"]), st.randoms(use_true_random=False))
def test_by_keys_equals_the_oracle(rows: list[Row], chosen: Any, rejected: Any, source: random.Random) -> None:
    config = BuildPairsConfig(truncated_chosen=chosen, truncated_rejected=rejected)
    judged = groups.by_keys(frame(source.sample(rows, len(rows))), config)
    assert dict(judged.select("completion_id", "reason").iter_rows()) == oracle(rows, chosen, rejected)


def test_a_group_on_disk(tmp_path: Path) -> None:
    """Best first; the second 'x' stands higher already, the prompt q is left with one completion."""
    rows = [
        Row("p", "p0", 0.0, "z", num_tokens=4), Row("p", "p1", 3.0, "x"), Row("p", "p2", 2.0, "x "),
        Row("p", "p3", 1.0, "y"), Row("q", "q0", 1.0, "x"), Row("q", "q1", 1.0, "y"),
    ]  # fmt: skip
    totals = build(tmp_path / "o", run_of(tmp_path / "g", rows), output="groups")["totals"]
    (group,) = from_table(RankedGroup, store.read_dataset(tmp_path / "o", "groups", RankedGroup))
    assert group.completion_ids == ["p1", "p3", "p0"]
    assert group.rewards == [3.0, 1.0, 0.0]
    assert [m[0]["content"] for m in group.completions] == ["x", "y", "z"]
    assert group.token_ids == [ids_of(rows[n]) for n in (1, 3, 0)]
    assert group.ref_logps == [logps_of(rows[n], "w").ref_logps for n in (1, 3, 0)]
    assert (group.reference, group.scorer, group.weight) == ("weights:a", "fake-1", 1.0)
    assert {(d.id, d.reason) for d in ledger_of(tmp_path / "o")} == {
        ("p2", "identical_text"), ("q1", "tie"), ("q0", "too_few")
    }  # fmt: skip
    assert (totals["groups"], totals["completions_in_groups"]) == (1, 3)


def test_a_group_with_half_a_reference_has_none(tmp_path: Path) -> None:
    rows = [Row("p", f"p{n}", float(n), f"t{n}") for n in range(3)]
    full, bare = run_of(tmp_path / "a", rows[:2]), run_of(tmp_path / "b", rows[2:], reference=None)
    build(tmp_path / "o", full, bare, output="groups")
    (group,) = from_table(RankedGroup, store.read_dataset(tmp_path / "o", "groups", RankedGroup))
    assert {group.ref_logps is None, group.reference is None, group.scorer is None} == {True}


@pytest.mark.parametrize("count", [1, 0])
def test_no_completions(count: int) -> None:
    judged = groups.by_keys(frame([Row("p", "p0", 1.0)][:count]), BuildPairsConfig())
    assert judged["reason"].to_list() == ["too_few"][:count]
