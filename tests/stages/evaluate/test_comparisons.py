"""Wins, ties and losses by hand, and comparisons of runs as a user makes them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from prefpipe.errors import DataError, UsageError
from prefpipe.runs import store
from prefpipe.schemas import Evaluation
from prefpipe.stages.evaluate.baselines import Other
from prefpipe.stages.evaluate.comparisons import Met, compare, meet, tally
from tests.conftest import Call, Write
from tests.stages.evaluate.cases import config, estimates_hold, prompts_file, row, rows_of, run, summary


def met(prompt: str, ours: float | None, theirs: float | None) -> Met:
    return Met(prompt, "sampled", ours, theirs, 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"),
    [(1.0, 0.5, 1), (0.5, 1.0, -1), (0.5, 0.5, 0), (None, None, 0), (None, -3.0, -1), (0.0, None, 1)],
)
def test_an_answer_without_a_reward_loses_to_one_that_has_a_reward(
    ours: float | None, theirs: float | None, outcome: int
) -> None:
    assert met("p", ours, theirs).outcome == outcome


def test_a_comparison_by_hand() -> None:
    """p: two wins, one of them over the threshold; q: a loss and a tie. Pass: p 1 of 2 against 0, q 1 of 2 against 2 of
    2. Differences of the pass rate by prompt 0.5 and -0.5; of the reward (0.6 + 0.1 - 1 + 0) / 4."""
    pairs = [met("p", 1.0, 0.4), met("p", 0.5, 0.4), met("q", 0.0, 1.0), met("q", 1.0, 1.0)]
    found = compare(pairs, 1.0)
    expected = {"win": 2, "tie": 1, "loss": 1, "win_rate": 0.625, "difference": 0.0, "p_value": 1.0}
    assert {name: found[name] for name in expected} == expected
    assert found["mean_reward_difference"] == pytest.approx(-0.075)
    assert estimates_hold(found) == []


def test_the_p_value_of_greedy_answers_is_that_of_mcnemar() -> None:
    """9 prompts won, 1 lost: 2 (1 + 10) / 1024; ties have no part."""
    assert tally([[1]] * 9 + [[-1]] + [[0]] * 5)["p_value"] == pytest.approx(22 / 1024)


def test_answers_meet_those_of_the_same_number() -> None:
    rows = [row("p", "greedy", 1.0, "four"), row("q", "greedy", 1.0), row("p", "sampled", 0.5, "seven..")]
    object.__setattr__(rows[2], "sample_index", 1)
    theirs = {("p", 0): Other(0.25, 2), ("p", 1): Other(0.75, 9), ("p", 2): Other(9, 9), ("r", 0): Other(1, 1)}
    assert meet(rows, theirs) == [Met("p", "greedy", 1.0, 0.25, 2), Met("p", "sampled", 0.5, 0.75, -2)]


def test_a_run_against_another_seed_of_the_same_policy(
    call: Call, tiny_model: Path, write: Write, tmp_path: Path
) -> None:
    """A/A through the command line: the fake engine is even with itself, and every number stands in its interval."""
    common = ("evaluate", "--model", tiny_model, "--prompts", prompts_file(write, 30), "--engine", "fake")
    common = (*common, "--reward", "short_sentence", "--pass-reward", "0.7", "--num-samples", "3")
    assert call(*common, "--out", tmp_path / "a").code == 0
    done = call(*common, "--seed", "5", "--baseline", tmp_path / "a", "--out", tmp_path / "b")
    assert done.code == 0, done.stderr
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (found,) = manifest["totals"]["comparisons"]
    assert (found["baseline"], found["prompts"]) == (store.read_manifest(tmp_path / "a")["digest"], 30)
    assert manifest["places"] == {found["baseline"]: str(tmp_path / "a")}
    assert found["policy"] == rows_of(tmp_path / "a")[0].policy
    assert "differs" not in found
    assert (found["greedy"]["tie"], found["greedy"]["win_rate"], found["greedy"]["p_value"]) == (30, 0.5, 1.0)
    sampled = found["sampled"]
    assert sampled["win"] + sampled["tie"] + sampled["loss"] == 90
    assert sampled["low"] <= 0.5 <= sampled["high"]
    assert sampled["p_value"] > 0.05
    assert found["length_controlled"]["win_rate_low"] <= 0.5 <= found["length_controlled"]["win_rate_high"]
    assert estimates_hold(found) == []
    ours, theirs = ({(r.prompt_id, r.sample_index): r for r in rows_of(tmp_path / n)} for n in ("b", "a"))
    wins = [reward(ours[k]) > reward(theirs[k]) for k in ours if k[1]]
    assert sampled["win"] == sum(wins)
    assert f"against {tmp_path / 'a'}, 30 prompts:" in summary(tmp_path / "b")
    assert re.search(r"sampled: \d+ won, \d+ tied, \d+ lost, win rate .*%\], p = ", summary(tmp_path / "b"))


def reward(answer: Evaluation) -> float:
    assert answer.reward is not None
    return answer.reward


def test_a_baseline_can_be_named_later_and_is_followed(
    tiny_model: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The comparison alone is computed. When the baseline changes, it is computed again."""
    path = prompts_file(write, 6)
    run(config(tiny_model, path, seed=1), tmp_path / "a")
    plain = run(config(tiny_model, path), tmp_path / "b")
    capsys.readouterr()
    compared = config(tiny_model, path, baseline=(str(tmp_path / "a"),))
    first = run(compared, tmp_path / "b")
    assert "starting engine" not in capsys.readouterr().err
    assert {**first["totals"], "comparisons": None} == {**plain["totals"], "comparisons": None}
    assert run(compared, tmp_path / "b") == first
    assert "is complete already" in capsys.readouterr().err
    again = config(tiny_model, path, seed=1, temperature=0.5)
    run(again, tmp_path / "c")
    for file in (tmp_path / "a").iterdir():
        if file.is_file():
            file.unlink()
    (tmp_path / "a").rename(tmp_path / "old")
    (tmp_path / "c").rename(tmp_path / "a")
    second = run(compared, tmp_path / "b")
    assert second["totals"]["comparisons"][0]["differs"] == {"temperature": [0.5, 1.0]}
    assert "was evaluated with other settings: temperature (0.5 there, 1.0 here)" in capsys.readouterr().err
    assert run(config(tiny_model, path), tmp_path / "b")["totals"] == plain["totals"]


def test_only_shared_prompts_are_compared(
    tiny_model: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, many = prompts_file(write, 4, "few.jsonl"), prompts_file(write, 6, "many.jsonl")
    run(config(tiny_model, few, seed=2), tmp_path / "a")
    manifest = run(config(tiny_model, many, baseline=(str(tmp_path / "a"),)), tmp_path / "b")
    (found,) = manifest["totals"]["comparisons"]
    assert (found["prompts"], found["greedy"]["tie"]) == (4, 4)
    assert "4 prompts are shared, of 4 there and 6 here" in capsys.readouterr().err
    other = prompts_file(write, 3, "other.jsonl", "something else")
    with pytest.raises(DataError, match=r"shares no prompt with this evaluation \(4 there, 3 here\)"):
        run(config(tiny_model, other, baseline=(str(tmp_path / "a"),)), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_where_a_baseline_lies_is_no_part_of_the_digest(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    """The same baseline in two places, compared by two runs; people see the place of theirs."""
    path = prompts_file(write, 3)
    run(config(tiny_model, path), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "moved" / "a")
    found = [
        run(config(tiny_model, path, seed=1, baseline=(str(directory),)), tmp_path / name)
        for name, directory in (("b", tmp_path / "a"), ("c", tmp_path / "moved/a"))
    ]
    assert found[0]["digest"] == found[1]["digest"]
    assert str(tmp_path) not in json.dumps(found[0]["totals"])
    assert f"against {tmp_path}/moved/a, 3 prompts" in summary(tmp_path / "c")


def test_a_baseline_by_another_reward_is_refused(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    path = prompts_file(write, 2)
    run(config(tiny_model, path, reward="length"), tmp_path / "a")
    with pytest.raises(UsageError, match=r"pass by another reward: length \(length-1 .*short_sentence"):
        run(config(tiny_model, path, baseline=(str(tmp_path / "a"),)), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_baseline_that_is_not_complete_is_refused(call: Call, tiny_model: Path, write: Write, tmp_path: Path) -> None:
    path = prompts_file(write, 2)
    run(config(tiny_model, path), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    common = ("evaluate", "--model", tiny_model, "--prompts", path, "--engine", "fake", "--reward", "short_sentence")
    done = call(*common, "--baseline", tmp_path / "a", "--out", tmp_path / "b")
    assert (done.code, f"{tmp_path / 'a'} holds no complete run" in done.stderr) == (66, True), done.stderr
