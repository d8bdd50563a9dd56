"""Sums of rewards against plain Python, their scales and gaps, and the spread of their parts; numbers by hand."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.runs import store
from prefpipe.schemas import Label, RankedGroup, from_table
from tests.conftest import Call
from tests.stages.build_pairs.runs import Row, build, ledger_of, pairs_of, run_of

# helpful would choose a, math would choose b; c is the worst for both. Prompt q has another scale for helpful.
HELPFUL: Mapping[str, float | None] = {"pa": 1.0, "pb": 0.5, "pc": 0.0, "qa": 30.0, "qb": 10.0, "qc": 20.0}
MATH: Mapping[str, float | None] = {"pa": 0.0, "pb": 1.0, "pc": 0.0, "qa": 0.0, "qb": 1.0, "qc": 1.0}
ROWS = [Row(key[0], key, None, f"text {key}") for key in HELPFUL]
SUM = "0.7*helpful + 0.3*math"


def rated(out: Path, *, shards: int = 1, **others: Mapping[str, float | None]) -> Path:
    return run_of(out, ROWS, name=None, shards=shards, others=others or {"helpful": HELPFUL, "math": MATH})


def rewards_of(out: Path) -> dict[str, float]:
    """The reward of every completion in the pairs of a run."""
    sides = [((p.chosen_completion_id, p.chosen_reward), (p.rejected_completion_id, p.rejected_reward))
             for p in pairs_of(out)]  # fmt: skip
    return {key: reward for pair in sides for key, reward in pair if reward is not None}


def every_pair(out: Path, run: Path, **changes: Any) -> dict[str, float]:
    build(out, run, rule="all-above-gap", rule_gap=0.0, pairs_per_prompt=0, **changes)
    return rewards_of(out)


def standard(values: list[float]) -> list[float]:
    sd = statistics.pstdev(values)
    return [(v - statistics.fmean(values)) / sd if sd else 0.0 for v in values]


@pytest.mark.parametrize(
    ("text", "weights"),
    [(SUM, (0.7, 0.3, 0.0)), ("math - 0.1*helpful + 2", (-0.1, 1.0, 2.0)), ("2*helpful", (2.0, 0.0, 0.0))],
)
@pytest.mark.parametrize("scale", ["raw", "prompt", "run"])
def test_a_sum_is_that_of_its_parts(tmp_path: Path, text: str, weights: tuple[float, float, float], scale: str) -> None:
    found = every_pair(tmp_path / "p", rated(tmp_path / "g"), reward=text, reward_scale=scale)
    keys = list(HELPFUL)
    groups = {"raw": [], "run": [keys], "prompt": [keys[:3], keys[3:]]}[scale]
    values = {k: (float(HELPFUL[k] or 0), float(MATH[k] or 0)) for k in keys}
    for group in groups:
        scaled = zip(*(standard([values[k][part] for k in group]) for part in (0, 1)), strict=True)
        values |= dict(zip(group, scaled, strict=True))
    expected = {k: weights[0] * a + weights[1] * b + weights[2] for k, (a, b) in values.items()}
    assert found == pytest.approx(expected)


def test_a_part_that_is_equal_for_all_completions_is_zero_where_it_is_standardised(tmp_path: Path) -> None:
    """0.1 + 0.1 + 0.1 is not 3 * 0.1 in floats: a deviation of 1e-17 must not be blown up to 1."""
    run = rated(tmp_path / "g", helpful=HELPFUL, math=dict.fromkeys(HELPFUL, 0.1))
    for scale in ("prompt", "run"):
        alone = every_pair(tmp_path / f"{scale}-1", run, reward="helpful", reward_scale=scale)
        assert every_pair(tmp_path / f"{scale}-2", run, reward="helpful + 5*math", reward_scale=scale) == alone


def test_one_reward_is_what_the_inputs_hold(tmp_path: Path) -> None:
    found = every_pair(tmp_path / "p", rated(tmp_path / "g"), reward="helpful")
    assert found == HELPFUL
    report = json.loads((tmp_path / "p" / "data_report.json").read_text())
    assert "D15" not in [check["id"] for check in report["checks"]]


def test_a_sum_chooses_other_pairs_than_its_parts(tmp_path: Path) -> None:
    run = rated(tmp_path / "g")
    best = {}
    for text in ("helpful", "math", SUM, "0.3*helpful + 0.7*math"):
        out = tmp_path / f"p{len(best)}"
        build(out, run, reward=text, rule="best-worst")
        best[text] = {(p.chosen_completion_id, p.rejected_completion_id) for p in pairs_of(out) if p.prompt_id == "p"}
    assert best["helpful"] == best[SUM] == {("pa", "pc")}
    assert best["0.3*helpful + 0.7*math"] == {("pb", "pc")}


def test_a_completion_without_one_part_has_no_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pa has null math, qc no row of math at all; the rest is counted, told and standardised without them."""
    math = {k: None if k == "pa" else v for k, v in MATH.items() if k != "qc"}
    run = rated(tmp_path / "g", helpful=HELPFUL, math=math)
    found = every_pair(tmp_path / "p", run, reward=SUM, reward_scale="prompt")
    assert found.keys() == HELPFUL.keys() - {"pa", "qc"}
    assert found["pb"] == pytest.approx(1.0)  # 0.7 + 0.3: above the mean of two in both parts
    lines = {d.id: (d.reason, d.detail) for d in ledger_of(tmp_path / "p")}
    assert lines == dict.fromkeys(("pa", "qc"), ("no_reward", "null or missing: math"))
    assert "2 of 6 completions have no value of math: they are left out" in capsys.readouterr().err
    report = json.loads((tmp_path / "p" / "data_report.json").read_text())["checks"]
    (check,) = [c for c in report if c["id"] == "D15"]
    assert (check["level"], check["numbers"]["math"]["missing"], check["numbers"]["helpful"]["missing"]) == (
        "NOTICE", 2, 0
    )  # fmt: skip


def test_the_spread_of_the_parts(tmp_path: Path) -> None:
    """Terms 0.01*helpful and math. In a prompt, helpful has variances 1/6 and 200/3, math 2/9 and 2/9."""
    build(tmp_path / "p", rated(tmp_path / "g"), reward="0.01*helpful + math")
    report = json.loads((tmp_path / "p" / "data_report.json").read_text())["checks"]
    (check,) = [c for c in report if c["id"] == "D15"]
    helpful, math = check["numbers"]["helpful"], check["numbers"]["math"]
    within = (1e-4 * (1 / 6 + 200 / 3) / 2, 2 / 9)
    assert (helpful["sd_in_prompt"] ** 2, math["sd_in_prompt"] ** 2) == pytest.approx(within)
    assert helpful["sd"] == pytest.approx(0.01 * statistics.pstdev([1, 0.5, 0, 30, 10, 20]))
    assert math["share"] == pytest.approx(within[1] / sum(within))
    assert (check["level"], "helpful hardly changes" in check["advice"]) == ("NOTICE", True)


def test_labels_and_groups_go_by_the_sum(tmp_path: Path) -> None:
    run = rated(tmp_path / "g")
    build(tmp_path / "l", run, reward=SUM, output="labels", label_rule="threshold", label_threshold=0.6)
    labels = {r.completion_id: (r.label, r.reward)
              for r in from_table(Label, store.read_dataset(tmp_path / "l", "labels", Label))}  # fmt: skip
    assert labels["pa"] == (True, pytest.approx(0.7))
    assert labels["pc"] == (False, 0.0)
    build(tmp_path / "r", run, reward="math - 0.01*helpful", output="groups")
    groups = from_table(RankedGroup, store.read_dataset(tmp_path / "r", "groups", RankedGroup))
    assert [g.completion_ids for g in groups] == [["pb", "pc", "pa"], ["qb", "qc", "qa"]]
    for out in ("l", "r"):
        report = json.loads((tmp_path / out / "data_report.json").read_text())["checks"]
        assert "D15" in [c["id"] for c in report]


def test_shards_and_parts_of_other_runs_change_nothing(tmp_path: Path) -> None:
    whole = every_pair(tmp_path / "p", rated(tmp_path / "g"), reward=SUM, reward_scale="run")
    cut = every_pair(tmp_path / "q", rated(tmp_path / "s", shards=3), reward=SUM, reward_scale="run")
    bare = run_of(tmp_path / "bare", ROWS, name=None)
    one, two = rated(tmp_path / "one", helpful=HELPFUL), rated(tmp_path / "two", math=MATH)
    parts = every_pair(tmp_path / "r", bare, reward=SUM, reward_scale="run", reward_runs=(str(one), str(two)))
    assert whole == cut == parts


def test_a_run_that_lacks_parts(tmp_path: Path) -> None:
    """Every run of completions holds all of them; a run of --reward-runs holds one at least."""
    both, one = rated(tmp_path / "both"), rated(tmp_path / "one", helpful=HELPFUL)
    with pytest.raises(MissingInputError, match="one has no dataset 'rewards/math'"):
        build(tmp_path / "p", both, one, reward=SUM)
    bare = run_of(tmp_path / "bare", ROWS, name=None)
    with pytest.raises(MissingInputError, match="bare has no dataset 'rewards/helpful'"):
        build(tmp_path / "q", bare, reward=SUM, reward_runs=(str(both), str(bare)))
    with pytest.raises(UsageError, match=r"the inputs hold no reward 'maths' \(did you mean 'math'\?\)"):
        build(tmp_path / "r", both, reward="helpful + maths")


def test_faults_of_a_part_are_named_with_its_file(tmp_path: Path) -> None:
    run = rated(tmp_path / "g", helpful=HELPFUL, math=MATH | {"qa": float("inf")})
    with pytest.raises(DataError, match=r"rewards/math/part-00000\.parquet, row 3: column 'reward' is inf"):
        build(tmp_path / "p", run, reward=SUM)


def test_the_command_line(call: Call, tmp_path: Path) -> None:
    command = ("build-pairs", "--completions", rated(tmp_path / "g"), "--gap-filter", "none", "--out", tmp_path / "p")
    done = call(*command)
    assert (done.code, "no reward given" in done.stderr, "helpful, math" in done.stderr) == (2, True, True)
    done = call(*command, "--reward", "0.7*helpful + 0,3*math")
    assert (done.code, "character 16 (',')" in done.stderr) == (2, True), done.stderr
    done = call(*command, "--reward", SUM, "--reward-scale", "prompt")
    assert done.code == 0, done.stderr
    assert rewards_of(tmp_path / "p")["pa"] == pytest.approx(0.7 * 1.5**0.5 - 0.3 * 0.5**0.5)
