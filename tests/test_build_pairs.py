"""Completions to pairs: against a slow oracle, and every candidate is kept or has a reason."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from prefpipe import build_pairs, store
from prefpipe.build_pairs import best_worst, keep_useful
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.ids import content_id, ids_digest
from prefpipe.schemas import (
    Completion,
    Dropped,
    Message,
    Pair,
    Prompt,
    RefLogps,
    Reward,
    from_table,
    to_table,
)
from prefpipe.store import Manifest


@dataclass(frozen=True)
class Row:
    """What decides about a completion."""

    prompt_id: str
    completion_id: str
    reward: float | None
    text: str = ""
    finish_reason: str = "stop"
    num_tokens: int = 1


TEXTS = ("one", "two", " two ", "caf\u00e9", "cafe\u0301")
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["p", "q", "r"]),
        st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.5]),
        st.sampled_from(TEXTS),
        st.sampled_from(["stop", "length"]),
    ),
    max_size=14,
).map(lambda rows: [Row(p, f"{p}{n:02d}", x, t, f, n + 1) for n, (p, x, t, f) in enumerate(rows)])
SCHEMA = {
    "prompt_id": pl.String,
    "completion_id": pl.String,
    "reward": pl.Float64,
    "text": pl.String,
    "finish_reason": pl.String,
    "num_tokens": pl.UInt32,
}


def frame(rows: Sequence[Row]) -> pl.DataFrame:
    return pl.DataFrame([vars(r) for r in rows], schema=SCHEMA)


def oracle(rows: Sequence[Row], pairs_per_prompt: int) -> list[tuple[Row, Row]]:
    """The rule in words: sort a prompt's completions, best first; pair the k-th from both ends until they meet."""
    pairs = []
    for prompt_id in sorted({r.prompt_id for r in rows}):
        own = sorted((r for r in rows if r.prompt_id == prompt_id), key=lambda r: (-(r.reward or 0.0), r.completion_id))
        while len(own) >= 2 and sum(p[0].prompt_id == prompt_id for p in pairs) < pairs_per_prompt:
            pairs.append((own.pop(0), own.pop()))
    return pairs


def reason(chosen: Row, rejected: Row, min_gap: float, drop_truncated: bool) -> str | None:
    gap = (chosen.reward or 0.0) - (rejected.reward or 0.0)
    if chosen.text == rejected.text:
        return "identical_text"
    if gap == 0:
        return "tie"
    if gap <= min_gap:
        return "small_gap"
    return "truncated_chosen" if drop_truncated and chosen.finish_reason == "length" else None


@settings(deadline=None)
@given(ROWS, st.integers(1, 4))
def test_best_worst_equals_the_oracle(rows: list[Row], pairs_per_prompt: int) -> None:
    found = best_worst(frame(rows), pairs_per_prompt)
    expected = oracle(rows, pairs_per_prompt)
    names = ["completion_id", "reward", "text", "finish_reason"]
    for side, which in (("chosen", 0), ("rejected", 1)):
        columns = [f"{side}_{n}" for n in names] + [f"{side}_tokens"]
        assert found.select(columns).rows() == [
            (r.completion_id, r.reward, r.text, r.finish_reason, r.num_tokens) for r in (p[which] for p in expected)
        ]
    assert found["reward_gap"].to_list() == [(a.reward or 0.0) - (b.reward or 0.0) for a, b in expected]


@settings(deadline=None)
@given(ROWS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_order_of_rows_never_matters(rows: list[Row], pairs_per_prompt: int, source: random.Random) -> None:
    shuffled = list(rows)
    source.shuffle(shuffled)
    assert_frame_equal(best_worst(frame(shuffled), pairs_per_prompt), best_worst(frame(rows), pairs_per_prompt))


@settings(deadline=None)
@given(ROWS, st.integers(1, 9))
def test_no_completion_is_used_twice(rows: list[Row], pairs_per_prompt: int) -> None:
    found = best_worst(frame(rows), pairs_per_prompt)
    used = [*found["chosen_completion_id"], *found["rejected_completion_id"]]
    assert len(used) == len(set(used))
    assert (found["reward_gap"] >= 0).all()


@settings(deadline=None)
@given(ROWS, st.integers(1, 4), st.sampled_from([0.0, 0.25, 0.5, 10.0]), st.booleans())
def test_keep_useful_equals_the_oracle_and_loses_nothing(
    rows: list[Row], pairs_per_prompt: int, min_gap: float, drop_truncated: bool
) -> None:
    selected = best_worst(frame(rows), pairs_per_prompt)
    kept, dropped = keep_useful(selected, min_gap, drop_truncated_chosen=drop_truncated)
    judged = [(a, b, reason(a, b, min_gap, drop_truncated)) for a, b in oracle(rows, pairs_per_prompt)]
    assert list(zip(kept["chosen_completion_id"], kept["rejected_completion_id"], strict=True)) == [
        (a.completion_id, b.completion_id) for a, b, why in judged if why is None
    ]
    assert dropped.select("id", "reason").rows() == [
        (f"{a.completion_id}>{b.completion_id}", why) for a, b, why in judged if why is not None
    ]
    assert kept.height + dropped.height == selected.height


def test_best_worst_by_hand() -> None:
    """Rewards 5 4 3 2 1: (5, 1), (4, 2), and the middle one stays alone, however many pairs are allowed."""
    rows = [Row("p", f"c{n}", float(n)) for n in (3, 1, 5, 2, 4)]
    for allowed, expected in ((1, [(5, 1)]), (2, [(5, 1), (4, 2)]), (9, [(5, 1), (4, 2)])):
        found = best_worst(frame(rows), allowed)
        assert list(zip(found["chosen_reward"], found["rejected_reward"], strict=True)) == expected


def run_of(out: Path, rows: Sequence[Row], *, reference: str | None = "weights:a", name: str = "mine:f") -> Path:
    """A finished run of generate with these completions; a reward of None stands in the file as null."""
    inputs = {"prompts": content_id([vars(r) for r in rows])}
    with store.open_run(out, "generate", GenerateConfig(), inputs, force=False) as run:
        prompts = sorted({r.prompt_id for r in rows})
        run.write_part("prompts", Prompt, 0, to_table(Prompt, [_prompt(p) for p in prompts]))
        if reference is not None:
            logps = [_logps(r, reference) for r in rows]
            run.write_part("ref_logps", RefLogps, 0, to_table(RefLogps, logps))
        rewards = [Reward(r.completion_id, name, r.reward, "ok", None) for r in rows]
        run.write_part(f"rewards/{name}", Reward, 0, to_table(Reward, rewards))
        run.write_part("completions", Completion, 0, to_table(Completion, [_completion(r) for r in rows]))
        run.finish({}, {})
    return out


def _prompt(prompt_id: str) -> Prompt:
    return Prompt(prompt_id, [Message(role="user", content=f"about {prompt_id}")], None, "train", "", "{}")


def _ids(row: Row) -> list[int]:
    return [*list(row.completion_id.encode())[: row.num_tokens], 2]


def _completion(row: Row) -> Completion:
    return Completion(
        row.completion_id, row.prompt_id, 0, row.text, [1, 5], _ids(row), row.finish_reason, "weights:a",
        ids_digest([1, 5], _ids(row)),
    )  # fmt: skip


def _logps(row: Row, reference: str) -> RefLogps:
    values = [-float(i) / 4 for i in _ids(row)]
    return RefLogps(
        row.completion_id, reference, "fake-1", ids_digest([1, 5], _ids(row)), values, sum(values), len(values)
    )


def build(out: Path, *runs: Path, **changes: Any) -> Manifest:
    settings = BuildPairsConfig(completions=tuple(map(str, runs)), reward="mine:f", **changes)
    return build_pairs.run(settings, out, force=False)


def pairs_of(out: Path) -> list[Pair]:
    return from_table(Pair, store.read_dataset(out, "pairs", Pair))


def ledger_of(out: Path) -> list[Dropped]:
    return from_table(Dropped, store.read_parquet(out / "dropped.parquet"))


GOOD = [Row("p", "p0", 1.0, "good"), Row("p", "p1", 0.0, "bad", num_tokens=2)]


def test_a_pair_carries_texts_ids_and_reference_log_probs(tmp_path: Path) -> None:
    manifest = build(tmp_path / "o", run_of(tmp_path / "g", GOOD))
    (pair,) = pairs_of(tmp_path / "o")
    logps = [_logps(r, "weights:a") for r in GOOD]
    assert pair == Pair(
        pair_id=content_id("p0", "p1"), prompt_id="p", chosen_completion_id="p0", rejected_completion_id="p1",
        prompt=[Message(role="user", content="about p")], chosen=[Message(role="assistant", content="good")],
        rejected=[Message(role="assistant", content="bad")], prompt_token_ids=[1, 5], chosen_token_ids=[112, 2],
        rejected_token_ids=[112, 49, 2], chosen_ids_digest=ids_digest([1, 5], [112, 2]),
        rejected_ids_digest=ids_digest([1, 5], [112, 49, 2]), chosen_reward=1.0, rejected_reward=0.0, reward_gap=1.0,
        preference_prob=None, chosen_finish_reason="stop", rejected_finish_reason="stop", weight=1.0,
        ref_chosen_logps=logps[0].ref_logps, ref_rejected_logps=logps[1].ref_logps,
        ref_chosen_token_logps=logps[0].token_logps, ref_rejected_token_logps=logps[1].token_logps,
        reference="weights:a", scorer="fake-1",
    )  # fmt: skip
    assert manifest["totals"] == {
        "completions": 2, "prompts": 1, "candidates": 1, "pairs": 1, "dropped": {}, "mean_reward_gap": 1.0,
        "chosen_longer": 0.0,
    }  # fmt: skip
    assert manifest["identity"]["policies"] == ["weights:a"]  # those that the completions were sampled from
    assert build_pairs.summary(manifest, tmp_path / "o")[-1] == "  dropped: nothing"


@settings(max_examples=12, deadline=None)
@given(ROWS, st.lists(st.booleans(), min_size=14, max_size=14), st.integers(1, 3))
def test_every_completion_is_paired_waiting_or_in_the_ledger(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], unrated: list[bool], pairs_per_prompt: int
) -> None:
    """Nulls are no_reward; a prompt with one rated completion is too_few; every candidate has its place."""
    drawn = [replace(r, reward=None) if null else r for r, null in zip(rows, unrated[: len(rows)], strict=True)]
    rows = [*drawn, Row("z", "z0", 1.0, "good"), Row("z", "z1", 0.0, "bad")]  # one pair is always left
    rated = [replace(r, text=normalize("NFC", r.text).strip()) for r in rows if r.reward is not None]
    expected = oracle(rated, pairs_per_prompt)
    place = tmp_path_factory.mktemp("runs")
    totals = build(place / "o", run_of(place / "g", rows), pairs_per_prompt=pairs_per_prompt)["totals"]
    reasons = Counter(why for a, b in expected if (why := reason(a, b, 0.0, True)))
    alone = sum(n == 1 for n in Counter(r.prompt_id for r in rated).values())
    reasons += Counter({"no_reward": len(rows) - len(rated), "too_few": alone})
    assert totals["dropped"] == dict(reasons)
    assert Counter(d.reason for d in ledger_of(place / "o")) == reasons
    assert totals["candidates"] == len(expected)
    assert totals["pairs"] == len(pairs_of(place / "o")) == sum(not reason(a, b, 0.0, True) for a, b in expected)


def test_reasons_name_the_row(tmp_path: Path) -> None:
    """One prompt per reason: the ledger holds a completion, a prompt, or both completions of the pair."""
    rows = [
        *GOOD,
        Row("nulls", "n0", None), Row("nulls", "n1", 1.0, "x"),
        Row("tie", "t0", 0.5, "x"), Row("tie", "t1", 0.5, "y"),
        Row("same", "s0", 1.0, "caf\u00e9 "), Row("same", "s1", 0.0, "cafe\u0301"),
        Row("small", "m0", 0.35, "x"), Row("small", "m1", 0.25, "y"),
        Row("cut", "c0", 1.0, "x", "length"), Row("cut", "c1", 0.0, "y"),
        Row("fine", "f0", 1.0, "x"), Row("fine", "f1", 0.0, "y", "length"),
    ]  # fmt: skip
    build(tmp_path / "o", run_of(tmp_path / "g", rows), min_gap=0.2)
    assert {(d.id, d.reason, d.detail) for d in ledger_of(tmp_path / "o")} == {
        ("n0", "no_reward", "the reward is null or missing"),
        ("nulls", "too_few", "a pair needs two rated completions of the prompt"),
        ("t0>t1", "tie", "reward_gap 0.0"),
        ("s0>s1", "identical_text", "reward_gap 1.0"),
        ("m0>m1", "small_gap", "reward_gap 0.1"),
        ("c0>c1", "truncated_chosen", "reward_gap 1.0"),
    }
    assert [p.prompt_id for p in pairs_of(tmp_path / "o")] == ["fine", "p"]


def test_truncated_chosen_can_be_kept(tmp_path: Path) -> None:
    rows = [Row("p", "p0", 1.0, "x", "length"), Row("p", "p1", 0.0, "y")]
    run = run_of(tmp_path / "g", rows)
    assert build(tmp_path / "keep", run, truncated_chosen="keep")["totals"]["pairs"] == 1
    with pytest.raises(DataError, match=r"no pair is left \(truncated_chosen: 1\)"):
        build(tmp_path / "drop", run)


def test_min_gap_is_exclusive(tmp_path: Path) -> None:
    """A pair is kept when its gap is above min_gap: 0.5 is not above 0.5."""
    run = run_of(tmp_path / "g", [Row("p", "p0", 0.75, "x"), Row("p", "p1", 0.25, "y")])
    assert build(tmp_path / "below", run, min_gap=0.49)["totals"]["pairs"] == 1
    with pytest.raises(DataError, match="small_gap: 1"):
        build(tmp_path / "at", run, min_gap=0.5)


def test_completions_of_several_runs_meet_by_prompt(tmp_path: Path) -> None:
    """Neither run has a pair of its own; together they have one. The order of the runs changes nothing."""
    a = run_of(tmp_path / "a", [Row("p", "p0", 1.0, "x")])
    b = run_of(tmp_path / "b", [Row("p", "p1", 0.0, "y")])
    build(tmp_path / "ab", a, b)
    build(tmp_path / "ba", b, a)
    (pair,) = pairs_of(tmp_path / "ab")
    assert (pair.chosen_completion_id, pair.rejected_completion_id) == ("p0", "p1")
    assert pairs_of(tmp_path / "ba") == [pair]


def test_a_completion_that_two_runs_hold_counts_once(tmp_path: Path) -> None:
    """The same completion ids stand in both runs (one run given twice, or the second continues the first).

    Six completions rated 6 to 1: three pairs, (6, 1), (5, 2), (4, 3). Counted twice the best would meet itself.
    """
    rows = [Row("p", f"p{n}", float(n), f"text {n}") for n in range(1, 7)]
    a, b = run_of(tmp_path / "a", rows), run_of(tmp_path / "b", [*rows, Row("q", "q0", 1.0, "x")])
    for runs in ((a, a), (a, b)):
        out = tmp_path / f"o{runs[1].name}"
        build(out, *runs, pairs_per_prompt=3)
        found = [(p.chosen_reward, p.rejected_reward) for p in pairs_of(out)]
        assert found == [(6.0, 1.0), (5.0, 2.0), (4.0, 3.0)]


def test_shards_and_row_order_of_a_run_change_nothing(tmp_path: Path) -> None:
    rows = [Row(f"p{n % 3}", f"c{n}", n / 7, f"text {n}") for n in range(12)]
    build(tmp_path / "a", run_of(tmp_path / "ga", rows), pairs_per_prompt=2)
    build(tmp_path / "b", run_of(tmp_path / "gb", rows[::-1]), pairs_per_prompt=2)
    assert pairs_of(tmp_path / "a") == pairs_of(tmp_path / "b")
    assert ledger_of(tmp_path / "a") == ledger_of(tmp_path / "b")


def test_without_references_pairs_have_none(tmp_path: Path) -> None:
    build(tmp_path / "o", run_of(tmp_path / "g", GOOD, reference=None))
    (pair,) = pairs_of(tmp_path / "o")
    assert pair.reference is None
    assert pair.ref_chosen_logps is None
    assert pair.ref_rejected_token_logps is None
    assert pair.scorer is None


def test_references_never_mix(tmp_path: Path) -> None:
    a = run_of(tmp_path / "a", GOOD)
    b = run_of(tmp_path / "b", [Row("q", "q0", 1.0, "x"), Row("q", "q1", 0.0, "y")], reference="weights:b")
    with pytest.raises(DataError, match="log-probs of 2 references: weights:a, weights:b"):
        build(tmp_path / "o", a, b)


def test_a_pair_with_half_a_reference_names_it_or_has_none(tmp_path: Path) -> None:
    """chosen from a run without log-probs, rejected from one with: a value must never travel without its reference."""
    bare = run_of(tmp_path / "a", [Row("p", "p0", 1.0, "x")], reference=None)
    full = run_of(tmp_path / "b", [Row("p", "p1", 0.0, "y")])
    build(tmp_path / "o", bare, full)
    (pair,) = pairs_of(tmp_path / "o")
    assert pair.ref_chosen_logps is None
    assert pair.reference == "weights:a" or pair.ref_rejected_logps is None


def test_rewards_of_foreign_completions_are_an_error(tmp_path: Path) -> None:
    """A run whose rewards belong to other completions: somebody copied a folder."""
    out = tmp_path / "g"
    with store.open_run(out, "generate", GenerateConfig(), {}, force=False) as run:
        run.write_part("prompts", Prompt, 0, to_table(Prompt, [_prompt("p")]))
        run.write_part("rewards/mine:f", Reward, 0, to_table(Reward, [Reward("other", "mine:f", 1.0, "ok", None)]))
        run.write_part("completions", Completion, 0, to_table(Completion, [_completion(r) for r in GOOD]))
        run.finish({}, {})
    with pytest.raises(DataError, match="1 rewards belong to no completion"):
        build(tmp_path / "o", out)


def test_no_pair_left_leaves_the_reasons_behind(tmp_path: Path) -> None:
    rows = [Row("p", "p0", 1.0, "x"), Row("p", "p1", 1.0, "y"), Row("q", "q0", 1.0, "x"), Row("r", "r0", None)]
    run = run_of(tmp_path / "g", rows)
    with pytest.raises(DataError, match=r"no pair is left \(no_reward: 1, tie: 1, too_few: 1\)") as caught:
        build(tmp_path / "o", run)
    assert caught.value.exit_code == 65
    assert f"{tmp_path / 'o'}/dropped.parquet" in caught.value.hint
    assert sorted(d.id for d in ledger_of(tmp_path / "o")) == ["p0>p1", "q", "r0"]


def test_all_rewards_missing_is_the_same_error(tmp_path: Path) -> None:
    run = run_of(tmp_path / "g", [Row("p", "p0", None), Row("p", "p1", None)])
    with pytest.raises(DataError, match=r"no pair is left \(no_reward: 2\)"):
        build(tmp_path / "o", run)


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no completions given"):
        build(tmp_path / "o")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="holds no complete run"):
        build(tmp_path / "o", tmp_path / "empty")
    run = run_of(tmp_path / "g", GOOD, name="other:f")
    with pytest.raises(MissingInputError, match="no dataset 'rewards/mine:f'") as caught:
        build(tmp_path / "o", run)
    assert "rewards/other:f" in caught.value.hint


def test_a_complete_run_is_left_alone_and_other_settings_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "g", GOOD)
    first = build(tmp_path / "o", run)
    digest = (tmp_path / "o" / "pairs" / "part-00000.parquet").read_bytes()
    assert build(tmp_path / "o", run) == first
    assert (tmp_path / "o" / "pairs" / "part-00000.parquet").read_bytes() == digest
    with pytest.raises(UsageError, match=r"min_gap: 0\.0 there, 0\.1 now"):
        build(tmp_path / "o", run, min_gap=0.1)
