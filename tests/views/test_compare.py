"""Runs that differ in nothing, in little, in everything; rewards paired by prompt."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from prefpipe import statistics
from prefpipe.errors import UsageError
from prefpipe.views import compare, run_view
from tests.views.conftest import LETTERS


def test_a_run_against_its_copy_differs_in_nothing(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "e", tmp_path / "e")
    found = json.loads(compare.as_json([runs / "e", tmp_path / "e"]))
    assert found["settings"] == found["inputs"] == {}
    assert all(o["counts"] == o["shared_with_first"] for o in found["overlap"])
    for pairing in found["paired_with_first"][0]:
        assert pairing["outcomes"] == [0, 6, 0]
        assert (pairing["difference"][0], pairing["p_value"]) == (0, 1)


def test_rewards_are_paired_by_prompt(runs: Path) -> None:
    first, other = (run_view.view(runs / name) for name in ("e", "f"))
    found = {p.decoding: p for p in compare.paired(first, other)}
    assert set(found) == {"greedy", "sampled"}
    sampled = [
        pl.read_parquet(str(runs / name / "evaluations/*.parquet")).filter(decoding="sampled") for name in ("e", "f")
    ]
    means = [dict(f.group_by("prompt_id").agg(pl.col("reward").mean()).iter_rows()) for f in sampled]
    shared = sorted(means[0].keys() & means[1].keys())
    differences = [means[1][p] - means[0][p] for p in shared]
    assert found["sampled"].prompts == len(shared) == 5
    assert found["sampled"].difference == pytest.approx(statistics.mean([[d] for d in differences]))
    assert found["sampled"].outcomes[0] == sum(d > 0 for d in differences)


def test_completions_are_paired_by_every_reward(runs: Path) -> None:
    run = run_view.view(runs / "g")
    assert {p.reward for p in compare.paired(run, run)} == {LETTERS, "short_sentence"}
    assert compare.paired(run, run_view.view(runs / "p")) == []


def test_runs_of_other_commands_can_be_compared(runs: Path) -> None:
    found = json.loads(compare.as_json([runs / "g", runs / "p", runs / "e"]))
    assert [r["command"] for r in found["runs"]] == ["generate", "build-pairs", "evaluate"]
    assert {o["ids"] for o in found["overlap"]} == {"prompt_id"}


def test_one_run_is_no_comparison(runs: Path) -> None:
    with pytest.raises(UsageError, match="2 to 26 runs, not 1"):
        compare.runs_of([runs / "g"])
