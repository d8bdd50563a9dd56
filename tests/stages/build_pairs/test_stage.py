"""The stage on disk: what is written, that every completion has its place, and what is refused."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.generate import GenerateConfig
from prefpipe.errors import DataError, IdentityError, MissingInputError, PrefpipeError, UsageError
from prefpipe.ids import content_id, ids_digest
from prefpipe.runs import store, tables
from prefpipe.schemas import Completion, Message, Pair, Prompt, RefLogps, Reward, to_table
from prefpipe.stages import build_pairs
from prefpipe.stages.build_pairs import candidates, partitions
from tests.conftest import ROOT, Call, Cli
from tests.stages.build_pairs import runs
from tests.stages.build_pairs.runs import Row, build, ids_of, ledger_of, logps_of, pairs_of, run_of

GOOD = [Row("p", "p0", 1.0, "good"), Row("p", "p1", 0.0, "bad", num_tokens=3)]
MANY = [
    Row(f"p{n % 7}", f"c{n:02d}", (n * 37 % 11) / 4, f"text {n}", "length" if n % 5 == 0 else "stop", 2 + n % 4)
    for n in range(40)
]
CALLS = [{"rule": "best-worst", "pairs_per_prompt": 2}, {}, {"rule": "all-above-gap", "pairs_per_prompt": 0}]
CALLS += [{"output": "labels", "label_rule": "median"}, {"output": "groups"}, {"format": "trl"}]


def contents(out: Path) -> dict[str, bytes]:
    """Everything that does not name its inputs."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.suffix == ".parquet" or p.name == "data_report.json"
    }


def test_a_pair_carries_texts_ids_and_reference_log_probs(tmp_path: Path) -> None:
    manifest = build(tmp_path / "o", run_of(tmp_path / "g", GOOD))
    (pair,) = pairs_of(tmp_path / "o")
    ids, logps = [ids_of(r) for r in GOOD], [logps_of(r, "weights:a") for r in GOOD]
    assert pair == Pair(
        pair_id=content_id("p0", "p1"), prompt_id="p", chosen_completion_id="p0", rejected_completion_id="p1",
        prompt=[Message(role="user", content="about p")], chosen=[Message(role="assistant", content="good")],
        rejected=[Message(role="assistant", content="bad")], prompt_token_ids=[1, 5], chosen_token_ids=ids[0],
        rejected_token_ids=ids[1], chosen_ids_digest=ids_digest([1, 5], ids[0]),
        rejected_ids_digest=ids_digest([1, 5], ids[1]), chosen_reward=1.0, rejected_reward=0.0, reward_gap=1.0,
        preference_prob=None, chosen_finish_reason="stop", rejected_finish_reason="stop", weight=1.0,
        ref_chosen_logps=logps[0].ref_logps, ref_rejected_logps=logps[1].ref_logps,
        ref_chosen_token_logps=logps[0].token_logps, ref_rejected_token_logps=logps[1].token_logps,
        reference="weights:a", scorer="fake-1",
    )  # fmt: skip
    levels = manifest["totals"]["levels"]
    assert levels == {
        "completions": {"in": 2, "out": 2, "dropped": {}},
        "prompts": {"in": 1, "out": 1, "dropped": {}},
        "pairs": {"in": 1, "out": 1, "dropped": {}},
    }
    saved = json.loads((tmp_path / "o" / "data_report.json").read_text())
    assert saved == {"checks": manifest["totals"]["data_report"]}


ROWS = st.lists(
    st.tuples(
        st.sampled_from("pqr"), st.sampled_from([0.0, 0.25, 0.5, 1.0, None]),
        st.sampled_from(["one", "two", " two ", "", "caf\u00e9", "cafe\u0301", "<|im_end|> hi", "three"]),
        st.sampled_from(["stop", "length"]), st.integers(2, 6),
    ),
    max_size=14,
).map(lambda rows: [Row(p, f"{p}{n:02d}", x, t, f, k) for n, (p, x, t, f, k) in enumerate(rows)])  # fmt: skip
SETTINGS = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(["best-worst", "best-random-worse", "all-above-gap", "length-controlled"]),
        "pairs_per_prompt": st.sampled_from([0, 1, 2]),
        "rule_gap": st.sampled_from([0.0, 0.5]),
        "truncated_rejected": st.sampled_from(["drop", "keep"]),
        "special_tokens": st.sampled_from(["drop", "keep"]),
        "max_tokens": st.sampled_from([0, 4]),
        "output": st.sampled_from(["pairs", "labels", "groups"]),
        "label_rule": st.sampled_from(["mean", "threshold", "pairs", "quantile"]),
    }
)


@settings(max_examples=25, deadline=None)
@given(ROWS, SETTINGS)
def test_every_completion_prompt_and_pair_goes_on_or_stands_in_the_ledger(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], changes: dict[str, Any]
) -> None:
    """in = out + sum of reasons on every level, counted from the rows and from the files, not from the manifest."""
    # Two prompts always have a pair, labels of both kinds and a group.
    rows = [*rows, *(Row(p, f"{p}{x}", float(x), f"{p} {x}") for p in "yz" for x in (0, 1))]
    place = tmp_path_factory.mktemp("runs")
    totals = build(place / "o", run_of(place / "g", rows), **runs.fitting(changes))["totals"]
    ledger = Counter(d.reason for d in ledger_of(place / "o"))
    assert totals["dropped"] == dict(sorted(ledger.items()))
    levels = totals["levels"]
    assert levels["completions"]["in"] == len(rows) == totals["completions"]
    assert all(v["in"] == v["out"] + sum(v["dropped"].values()) for v in levels.values())
    assert sum((Counter(v["dropped"]) for v in levels.values()), Counter()) == ledger
    dropped = {d.id: d.reason for d in ledger_of(place / "o")}
    for row in rows:
        if row.reward is None:
            assert dropped[row.completion_id] == "no_reward"
        elif not row.text:
            assert dropped[row.completion_id] == "empty"
    if changes["output"] == "pairs":
        found = pairs_of(place / "o")
        assert levels["pairs"]["out"] == len(found) == totals["pairs"]
        assert sum(p.weight for p in found) == pytest.approx(len(found))
        assert all(p.chosen_reward > p.rejected_reward for p in found)  # type: ignore[operator]


@pytest.mark.parametrize("changes", CALLS, ids=str)
def test_shards_order_of_rows_and_of_runs_change_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    one = run_of(tmp_path / "a", MANY)
    build(tmp_path / "one", one, **changes)
    shuffled = random.Random(0).sample(MANY, len(MANY))
    build(tmp_path / "many", run_of(tmp_path / "b", shuffled, shards=5), **changes)
    halves = [run_of(tmp_path / f"h{n}", shuffled[n::2]) for n in (0, 1)]
    build(tmp_path / "halves", *halves, **changes)
    build(tmp_path / "turned", *halves[::-1], **changes)
    whole = contents(tmp_path / "one")
    assert len(whole) >= 3
    assert all(contents(tmp_path / name) == whole for name in ("many", "halves", "turned"))


@pytest.mark.parametrize("changes", CALLS, ids=str)
def test_partitions_change_only_how_the_rows_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Ten rows per partition make five partitions, through files, instead of one in memory."""
    run = run_of(tmp_path / "g", MANY, shards=3)
    manifest = build(tmp_path / "one", run, **changes)
    monkeypatch.setattr(candidates, "_ROWS_PER_PARTITION", 10)
    monkeypatch.setattr(partitions, "_BYTES_AT_ONCE", 1)
    several = build(tmp_path / "five", run, **changes)
    for name in ("levels", "dropped", "completions", "prompts"):
        assert several["totals"][name] == manifest["totals"][name]
    datasets = {n.split("/")[0] for n in manifest["files"] if "/" in n}
    for dataset in datasets:
        contents_of = [
            sorted(
                map(
                    str,
                    (
                        row
                        for f in sorted((tmp_path / o / dataset).glob("*.parquet"))
                        for row in tables.read_parquet(f).to_pylist()
                    ),
                )
            )
            for o in ("one", "five")
        ]
        assert contents_of[0] == contents_of[1]
        if dataset != "kl_bank":
            assert len(list((tmp_path / "five" / dataset).glob("*.parquet"))) > 2
    assert ledger_of(tmp_path / "one") == ledger_of(tmp_path / "five")
    assert not list((tmp_path / "five").glob(".*.tmp"))


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
        Row("bad", "b0", 1.0, " "), Row("bad", "b1", 0.5, "a [/INST] b"), Row("bad", "b2", 0.0, "ok"),
    ]  # fmt: skip
    build(tmp_path / "o", run_of(tmp_path / "g", rows), min_gap=0.2, gap_filter="absolute")
    assert {(d.id, d.reason, d.detail) for d in ledger_of(tmp_path / "o")} == {
        ("n0", "no_reward", "the reward is null or missing"),
        ("nulls", "too_few", "a pair needs two candidates of the prompt"),
        ("bad", "too_few", "a pair needs two candidates of the prompt"),
        ("tie", "tie", "the rewards of all 2 candidates are equal"),
        ("s0>s1", "identical_text", "reward_gap 1.0"),
        ("m0>m1", "small_gap", "reward_gap 0.1"),
        ("c0>c1", "truncated_chosen", "reward_gap 1.0"),
        ("b0", "empty", "2 tokens"),
        ("b1", "special_tokens", "2 tokens"),
    }
    assert [p.prompt_id for p in pairs_of(tmp_path / "o")] == ["fine", "p"]


def test_a_prompt_of_which_the_rule_finds_nothing(tmp_path: Path) -> None:
    rows = [*GOOD, Row("wrong", "w0", 0.1, "x"), Row("wrong", "w1", 0.0, "y")]
    build(tmp_path / "o", run_of(tmp_path / "g", rows), rule="correct-wrong")
    (dropped,) = ledger_of(tmp_path / "o")
    assert (dropped.id, dropped.reason) == ("wrong", "no_pair")
    assert dropped.detail == "rule correct-wrong pairs none of 2 candidates"


def test_truncated_sides_by_choice(tmp_path: Path) -> None:
    run = run_of(tmp_path / "g", [Row("p", "p0", 1.0, "x", "length"), Row("p", "p1", 0.0, "y")])
    assert build(tmp_path / "keep", run, truncated_chosen="keep")["totals"]["pairs"] == 1
    with pytest.raises(DataError, match=r"no pair is left \(truncated_chosen: 1\)"):
        build(tmp_path / "drop", run)
    other = run_of(tmp_path / "h", [Row("p", "p0", 1.0, "x"), Row("p", "p1", 0.0, "y", "length")])
    assert build(tmp_path / "rejected", other)["totals"]["pairs"] == 1
    with pytest.raises(DataError, match=r"no pair is left \(truncated_rejected: 1\)"):
        build(tmp_path / "both", other, truncated_rejected="drop")


def test_completions_of_several_runs_meet_by_prompt(tmp_path: Path) -> None:
    """Neither run has a pair of its own; together they have one. The order of the runs changes nothing."""
    a = run_of(tmp_path / "a", [Row("p", "p0", 1.0, "x", policy="weights:a")])
    b = run_of(tmp_path / "b", [Row("p", "p1", 0.0, "y", policy="weights:b")])
    build(tmp_path / "ab", a, b)
    build(tmp_path / "ba", b, a)
    (pair,) = pairs_of(tmp_path / "ab")
    assert (pair.chosen_completion_id, pair.rejected_completion_id) == ("p0", "p1")
    assert pairs_of(tmp_path / "ba") == [pair]


def test_rewards_and_references_from_runs_of_their_own(tmp_path: Path) -> None:
    """Completions without anything; the rewards of one scoring run, the log-probs of another."""
    bare = run_of(tmp_path / "bare", GOOD, reference=None, name=None)
    rated = run_of(tmp_path / "rated", GOOD, reference=None)
    scored = run_of(tmp_path / "scored", GOOD, reference="weights:z", name=None)
    build(tmp_path / "o", bare, reward_runs=(str(rated),), ref_logps=(str(scored),))
    (pair,) = pairs_of(tmp_path / "o")
    assert (pair.chosen_reward, pair.reference) == (1.0, "weights:z")
    assert pair.ref_chosen_logps == logps_of(GOOD[0], "weights:z").ref_logps
    with pytest.raises(UsageError, match=f"the inputs hold no reward '{runs.REWARD}'"):
        build(tmp_path / "x", bare)
    with pytest.raises(MissingInputError, match=f"bare has no dataset 'rewards/{runs.REWARD}'"):
        build(tmp_path / "x", bare, reward_runs=(str(rated), str(bare)))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "changes"), [(8, {}), (2, CALLS[3]), (2, {"output": "groups"})], ids=str)
def test_workers_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, changes: dict[str, Any]
) -> None:
    """Five partitions in this process or in several: the same manifest."""
    monkeypatch.setattr(candidates, "_ROWS_PER_PARTITION", 10)
    monkeypatch.setattr(partitions, "_BYTES_AT_ONCE", 1)
    runs = [run_of(tmp_path / f"h{n}", MANY[n::2], shards=2) for n in (0, 1)]
    digests = [build(tmp_path / str(n), *runs, workers=n, **changes)["digest"] for n in (1, workers)]
    assert digests[0] == digests[1]


def test_a_completion_that_two_runs_hold_counts_once(tmp_path: Path) -> None:
    """Six completions rated 6 to 1: three pairs, (6, 1), (5, 2), (4, 3). Counted twice the best would meet itself."""
    rows = [Row("p", f"p{n}", float(n), f"text {n}") for n in range(1, 7)]
    a, b = run_of(tmp_path / "a", rows), run_of(tmp_path / "b", [*rows, Row("q", "q0", 1.0, "x")])
    for pair_of_runs in ((a, a), (a, b)):
        out = tmp_path / f"o{pair_of_runs[1].name}"
        build(out, *pair_of_runs, rule="best-worst", pairs_per_prompt=3)
        found = sorted((p.chosen_reward, p.rejected_reward) for p in pairs_of(out))
        assert found == [(4.0, 3.0), (5.0, 2.0), (6.0, 1.0)]


def test_without_references_pairs_have_none(tmp_path: Path) -> None:
    build(tmp_path / "o", run_of(tmp_path / "g", GOOD, reference=None))
    (pair,) = pairs_of(tmp_path / "o")
    assert {pair.reference, pair.ref_chosen_logps, pair.scorer} == {None}
    assert pair.ref_rejected_token_logps is None


def test_references_never_mix(tmp_path: Path) -> None:
    a = run_of(tmp_path / "a", GOOD)
    b = run_of(tmp_path / "b", [Row("q", "q0", 1.0, "x"), Row("q", "q1", 0.0, "y")], reference="weights:b")
    with pytest.raises(DataError, match="log-probs of 2 references: weights:a, weights:b"):
        build(tmp_path / "o", a, b)


def test_a_pair_with_half_a_reference_has_none(tmp_path: Path) -> None:
    """chosen from a run without log-probs, rejected from one with: a value must never travel without its reference."""
    bare = run_of(tmp_path / "a", [Row("p", "p0", 1.0, "x")], reference=None)
    full = run_of(tmp_path / "b", [Row("p", "p1", 0.0, "y")])
    build(tmp_path / "o", bare, full)
    (pair,) = pairs_of(tmp_path / "o")
    assert {pair.reference, pair.ref_chosen_logps, pair.ref_rejected_logps} == {None}


def test_soft_labels_and_length_penalty(tmp_path: Path) -> None:
    """sigmoid(1 / 2) = 0.6225. With 0.5 per token the chosen (2 tokens) has 1 - 1 = 0, the rejected 0 - 1.5."""
    run = run_of(tmp_path / "g", GOOD)
    build(tmp_path / "o", run, preference_prob="bradley-terry", preference_scale=2.0)
    assert pairs_of(tmp_path / "o")[0].preference_prob == pytest.approx(0.622459, abs=1e-6)
    build(tmp_path / "l", run, length_penalty=0.5)
    (pair,) = pairs_of(tmp_path / "l")
    assert (pair.chosen_reward, pair.rejected_reward, pair.reward_gap) == (0.0, -1.5, 1.5)
    build(
        tmp_path / "t", run_of(tmp_path / "h", [GOOD[0], Row("p", "p1", 1.5, "bad", num_tokens=9)]), length_penalty=0.5
    )
    assert pairs_of(tmp_path / "t")[0].chosen_completion_id == "p0"


def test_weights_let_prompts_count_the_same(tmp_path: Path) -> None:
    """p has 3 pairs, q has 1, 2 on average: weights 2/3 and 2, mean 1. By pair all are 1."""
    rows = [
        *(Row("p", f"p{n}", float(n), f"t{n}") for n in range(3)),
        *(Row("q", f"q{n}", float(n), f"t{n}") for n in range(2)),
    ]
    run = run_of(tmp_path / "g", rows)
    asked = {"rule": "all-above-gap", "pairs_per_prompt": 0}
    build(tmp_path / "o", run, **asked)
    assert sorted(p.weight for p in pairs_of(tmp_path / "o")) == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0])
    build(tmp_path / "w", run, weight_by="pair", **asked)
    assert {p.weight for p in pairs_of(tmp_path / "w")} == {1.0}


def test_duplicate_prompts_are_dropped_with_their_completions(tmp_path: Path) -> None:
    prompts = [runs.prompt_of("p", "Say  hello"), runs.prompt_of("q", "say hello "), runs.prompt_of("r", "Say goodbye")]
    rows = [Row(p, f"{p}{n}", float(n), f"{p} {n}") for p in "pqr" for n in (0, 1)]
    run = run_of(tmp_path / "g", rows, prompts=prompts)
    totals = build(tmp_path / "o", run)["totals"]
    assert totals["dropped"] == {"duplicate_prompt": 2}
    assert {p.prompt_id for p in pairs_of(tmp_path / "o")} == {"p", "r"}
    assert ledger_of(tmp_path / "o")[0].detail == "prompt q: same text as p"
    assert build(tmp_path / "k", run, duplicate_prompts="keep")["totals"]["pairs"] == 3


def test_a_subset_needs_its_log_probs_and_names_the_command(tmp_path: Path) -> None:
    rows = [Row(f"p{p}", f"p{p}{n}", float(n), f"t{n}", num_tokens=3 + n) for p in range(8) for n in (0, 1)]
    run = run_of(tmp_path / "g", rows)
    policy = run_of(tmp_path / "t", rows, reference="weights:trained", name=None, scale=0.2)
    totals = build(tmp_path / "s", run, policy_logps=(str(policy),), subset="small-implicit-gap", subset_share=0.5)[
        "totals"
    ]
    assert (totals["pairs"], totals["dropped"]) == (4, {"not_in_subset": 4})
    clear = build(tmp_path / "c", run, subset="clear-reference", subset_share=0.25)["totals"]
    assert clear["pairs"] == 2
    with pytest.raises(DataError, match="have no reference log-probs"):
        build(tmp_path / "n", run_of(tmp_path / "b", rows, reference=None), subset="clear-reference")


def raw_run(
    out: Path, rewards: list[Reward], completions: list[Completion], logps: list[RefLogps] | None = None
) -> Path:
    with store.open_run(out, "generate", GenerateConfig(), {}, force=False) as run:
        run.write_part("prompts", Prompt, 0, to_table(Prompt, [runs.prompt_of("p")]))
        run.write_part(f"rewards/{runs.REWARD}", Reward, 0, to_table(Reward, rewards))
        if logps:
            run.write_part("ref_logps", RefLogps, 0, to_table(RefLogps, logps))
        run.write_part("completions", Completion, 0, to_table(Completion, completions))
        run.finish({}, {})
    return out


COMPLETIONS = [runs.completion_of(r) for r in GOOD]
REWARDS = [Reward(r.completion_id, runs.REWARD, r.reward, "ok", None) for r in GOOD]


def refused(tmp_path: Path, run: Path, kind: type[PrefpipeError], match: str) -> PrefpipeError:
    """The error of a run, which must leave nothing behind that looks finished."""
    with pytest.raises(kind, match=match) as caught:
        build(tmp_path / "o", run)
    assert not (tmp_path / "o" / "manifest.json").exists()
    assert not list((tmp_path / "o").glob("pairs/*"))
    return caught.value


def test_rewards_of_foreign_completions(tmp_path: Path) -> None:
    foreign = [*REWARDS, Reward("other", runs.REWARD, 1.0, "ok", None)]
    run = raw_run(tmp_path / "g", foreign, COMPLETIONS)
    place = "part-00000.parquet, row 2: column 'completion_id' is other"
    refused(tmp_path, run, DataError, f"1 rewards belong to no completion of these runs; .*{place}")


def test_a_completion_twice_in_a_run(tmp_path: Path) -> None:
    run = raw_run(tmp_path / "g", REWARDS, [*COMPLETIONS, COMPLETIONS[0]])
    error = refused(tmp_path, run, DataError, r"completions/part-00000\.parquet, row 2: column 'completion_id': p0 is")
    assert "(1 such ids)" in error.message


def test_a_reward_twice_in_a_run(tmp_path: Path) -> None:
    run = raw_run(tmp_path / "g", [*REWARDS, REWARDS[1]], COMPLETIONS)
    refused(
        tmp_path, run, DataError, r"rewards/mine:f/part-00000\.parquet, row 2: column 'completion_id': p1 is there tw"
    )


def test_two_rewards_of_one_completion(tmp_path: Path) -> None:
    a, b = run_of(tmp_path / "a", GOOD), run_of(tmp_path / "b", [Row("p", "p0", 0.5, "good"), GOOD[1]])
    with pytest.raises(DataError, match=r"1 completions have two rewards .* row 0: completion_id p0 has 0\.5 and 1\.0"):
        build(tmp_path / "o", a, b)


def test_infinite_rewards(tmp_path: Path) -> None:
    """NaN never gets into a file (the store refuses it), infinity does; a difference of two is NaN."""
    rewards = [REWARDS[0], Reward("p1", runs.REWARD, float("-inf"), "ok", None)]
    run = raw_run(tmp_path / "g", rewards, COMPLETIONS)
    refused(tmp_path, run, DataError, r"part-00000\.parquet, row 1: column 'reward' is -inf \(1 such rows\)")


def test_log_probs_of_other_ids(tmp_path: Path) -> None:
    stale = [logps_of(GOOD[0], "w"), logps_of(Row("p", "p1", 0.0, "bad", num_tokens=9), "w")]
    run = raw_run(tmp_path / "g", REWARDS, COMPLETIONS, stale)
    error = refused(tmp_path, run, IdentityError, "the log-probs of 1 completions were made for other token ids")
    assert error.exit_code == 76


def test_a_prompt_that_is_tokenised_in_two_ways(tmp_path: Path) -> None:
    other = Completion("p1", "p", 0, "bad", [1, 6], [7, 2], "stop", "weights:b", ids_digest([1, 6], [7, 2]))
    run = raw_run(tmp_path / "g", REWARDS, [COMPLETIONS[0], other])
    refused(tmp_path, run, DataError, "1 pairs join completions whose prompt has other token ids")


def test_a_prompt_that_no_run_holds(tmp_path: Path) -> None:
    completions = [runs.completion_of(Row("lost", r.completion_id, r.reward, r.text)) for r in GOOD]
    refused(tmp_path, raw_run(tmp_path / "g", REWARDS, completions), DataError, r"1 prompts are in no prompts/ .*lost")


def test_an_end_token_on_one_side_only(tmp_path: Path) -> None:
    """Thirty chosen completions end with token 2, no rejected one does: the two sides were tokenised apart."""
    completions, rewards = [], []
    for n in range(30):
        for side, ids in (("a", [100 + n, 2]), ("b", [100 + n, 50 + n])):
            key = f"{n:02d}{side}"
            digest = ids_digest([1, 5], ids)
            completions.append(Completion(key, "p", 0, key, [1, 5], ids, "stop", "w", digest))
            rewards.append(Reward(key, runs.REWARD, 1.0 if side == "a" else 0.0, "ok", None))
    run = raw_run(tmp_path / "g", rewards, completions)
    with pytest.raises(DataError, match="chosen completions end with token 2, none of 30 rejected ones does"):
        build(tmp_path / "o", run, rule="best-worst", pairs_per_prompt=0)
    assert not list((tmp_path / "o").glob("pairs/*"))


def test_files_of_another_kind_or_damaged(tmp_path: Path) -> None:
    run = run_of(tmp_path / "g", GOOD)
    part = run / "completions" / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(bytes(content))
    refused(tmp_path, run, DataError, r"completions/part-00000\.parquet is damaged")


def test_no_pair_left_leaves_the_reasons_behind(tmp_path: Path) -> None:
    rows = [Row("p", "p0", 1.0, "x"), Row("p", "p1", 1.0, "y"), Row("q", "q0", 1.0, "x"), Row("r", "r0", None)]
    run = run_of(tmp_path / "g", rows)
    with pytest.raises(DataError, match=r"no pair is left \(no_reward: 1, tie: 1, too_few: 1\)") as caught:
        build(tmp_path / "o", run)
    assert caught.value.exit_code == 65
    assert f"{tmp_path / 'o'}/dropped.parquet" in caught.value.hint
    assert sorted(d.id for d in ledger_of(tmp_path / "o")) == ["p", "q", "r0"]


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no completions given"):
        build(tmp_path / "o")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="holds no complete run"):
        build(tmp_path / "o", tmp_path / "empty")
    run = run_of(tmp_path / "g", GOOD, name="other:f")
    with pytest.raises(UsageError, match="the inputs hold no reward 'mine:f'") as caught:
        build(tmp_path / "o", run)
    assert "the inputs hold other:f" in caught.value.hint
    with pytest.raises(UsageError, match="no reward given") as caught:
        build(tmp_path / "o", run, reward="")
    assert caught.value.hint == "pass --reward NAME or a sum: the inputs hold other:f"
    assert not (tmp_path / "o").exists()


def test_a_complete_run_is_left_alone_and_other_settings_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "g", GOOD)
    first = build(tmp_path / "o", run)
    before = contents(tmp_path / "o")
    assert build(tmp_path / "o", run) == first
    assert contents(tmp_path / "o") == before
    with pytest.raises(UsageError, match="pairs_per_prompt: 1 there, 2 now"):
        build(tmp_path / "o", run, pairs_per_prompt=2)


def test_strict_turns_a_warning_into_exit_3(tmp_path: Path, call: Call) -> None:
    """One pair is few: D6 warns. The run is complete either way, and says the same when it is asked again."""
    run = run_of(tmp_path / "g", GOOD)
    for out, flags in (("plain", ()), ("strict", ("--strict",)), ("plain", ("--strict",)), ("strict", ())):
        done = call(
            "build-pairs", "--completions", run, "--reward", runs.REWARD, "--gap-filter", "none", *flags,
            "--out", tmp_path / out,
        )  # fmt: skip
        assert done.code == (3 if flags else 0), done.stderr
        assert (tmp_path / out / "manifest.json").exists()
        if flags:
            assert "D6  WARN    size                 1 pairs" in done.stderr
            error, hint = done.stderr.strip().splitlines()[-2:]
            assert error == "error: the data report warns: D2, D6, D7, D11, D13"
            assert hint == f"hint: see {tmp_path / out}/data_report.json, or leave out --strict"


def test_strict_has_nothing_to_say_without_a_warning(tmp_path: Path, call: Call) -> None:
    """Labels have one check, D12, and no warning."""
    run = run_of(tmp_path / "g", [Row(p, f"{p}{n}", float(n), f"{p} {n}") for p in "pq" for n in (0, 1)])
    command = ("build-pairs", "--completions", run, "--reward", runs.REWARD, "--output", "labels", "--strict")
    done = call(*command, "--out", tmp_path / "o")
    assert done.code == 0, done.stderr


def test_a_setting_that_the_rule_does_not_read_is_refused_on_the_command_line(tmp_path: Path, call: Call) -> None:
    done = call(
        "build-pairs", "--completions", tmp_path, "--rule", "best-worst", "--rule-gap", 0.1, "--out", tmp_path / "o"
    )
    assert done.code == 2
    assert "rule_gap = 0.1 is read only with rule = all-above-gap or smallest-gap" in done.stderr
    assert not (tmp_path / "o").exists()


def test_the_summary_counts_every_level(tmp_path: Path) -> None:
    manifest = build(tmp_path / "o", run_of(tmp_path / "g", [*GOOD, Row("q", "q0", 1.0, "x")]))
    lines = build_pairs.summary(manifest, tmp_path / "o")
    assert lines[1:5] == [
        "  completions: 3 in, 3 out; dropped: nothing",
        "  prompts: 2 in, 1 out; dropped: too_few: 1",
        "  pairs: 1 in, 1 out; dropped: nothing",
        "  mean reward_gap 1.000, chosen longer than rejected in 0%",
    ]


def test_bad_input_on_the_command_line(tmp_path: Path, cli: Cli) -> None:
    """One error of two lines with file, row, column and count; exit 65."""
    run = raw_run(tmp_path / "g", [*REWARDS, Reward("other", runs.REWARD, 1.0, "ok", None)], COMPLETIONS)
    done = cli("build-pairs", "--completions", run, "--reward", runs.REWARD, "--out", tmp_path / "o")
    assert done.returncode == 65
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: 1 rewards belong to no completion of these runs; ")
    assert error.endswith("rewards/mine:f/part-00000.parquet, row 2: column 'completion_id' is other")
    assert hint == "hint: pass the runs they were made for with --completions"
    assert done.stdout == ""


def test_every_reason_is_documented() -> None:
    """Names of reasons in the code and in docs/pair-rules.md are the same."""
    code = "".join(p.read_text() for p in (ROOT / "prefpipe" / "stages" / "build_pairs").glob("*.py"))
    page = (ROOT / "docs" / "pair-rules.md").read_text().partition("## Reasons in the ledger")[2]
    named = set(re.findall(r'then\(pl\.lit\("(\w+)"\)\)', code)) | set(re.findall(r'reason=pl\.lit\("(\w+)"\)', code))
    assert len(named) > 20
    assert {n for n in named if n not in page and not n.startswith("truncated")} == set()
