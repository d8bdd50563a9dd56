"""Pair rules of users: checked pairs, and that a right one makes what the built-in one makes."""

from pathlib import Path
from typing import Any

import pytest

import prefpipe
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.stages.build_pairs import pair_rules, user_rules
from prefpipe.stages.build_pairs.pair_rules import rank
from tests.conftest import ROOT, Call
from tests.e2e.letters import most_letters
from tests.stages.build_pairs import user as mine
from tests.stages.build_pairs.runs import Row, frame

USER = "tests.stages.build_pairs.user"
RANKED = rank(frame([Row(p, f"{p}{n}", x) for p in "pq" for n, x in enumerate([1.0, 0.0, 2.0])]))


def config(name: str, **settings: Any) -> BuildPairsConfig:
    return BuildPairsConfig.model_validate({"rule": f"{USER}:{name}", **settings})


def test_a_right_one_makes_the_pairs_of_the_built_in_one() -> None:
    found = user_rules.find(f"{USER}:best_worst")(RANKED, config("best_worst"))
    assert found.rows() == pair_rules.best_worst(RANKED, BuildPairsConfig(rule="best-worst")).rows()
    assert user_rules.find("best-worst") is pair_rules.best_worst


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "no polars frame with the columns chosen and rejected"),
        ("ids", "not whole numbers, the positions in ranked.flat"),
        ("outside", "a position is outside of the 6 rows"),
        ("across", "completions of two prompts"),
        ("turned", "the chosen completion of a pair has no higher reward"),
        ("twice", "a pair is there twice"),
        ("fails", "it failed: ColumnNotFoundError"),
        ("leaves", "it failed: SystemExit: 0"),
    ],
)
def test_a_wrong_one_is_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=rf"pair rule {USER}:{name} cannot be used: .*{words}"):
        user_rules.find(f"{USER}:{name}")(RANKED, config(name))


def test_the_bytes_of_its_module_are_part_of_the_run() -> None:
    assert user_rules.inputs(BuildPairsConfig()) == {}
    assert user_rules.inputs(config("best_worst")).keys() == {f"rule {USER}:best_worst"}
    with pytest.raises(UsageError, match="has no 'no_such_rule'"):
        user_rules.inputs(config("no_such_rule"))
    with pytest.raises(MissingInputError, match="pair rule nowhere:f: no module 'nowhere'"):
        user_rules.inputs(BuildPairsConfig(rule="nowhere:f"))


def test_the_command_line_and_a_callable_make_one_run(tiny_model: Path, tmp_path: Path, call: Call) -> None:
    sampled = prefpipe.generate(
        model=tiny_model, prompts=ROOT / "data" / "prompts.jsonl", engine="fake", limit=4, num_samples=4,
        rewards=most_letters, out=tmp_path / "g",
    )  # fmt: skip
    settings: dict[str, Any] = {"completions": sampled, "reward": most_letters, "gap_filter": "none"}
    ours = prefpipe.build_pairs(**settings, rule="best-worst", out=tmp_path / "ours")
    theirs = prefpipe.build_pairs(**settings, rule=mine.best_worst, out=tmp_path / "theirs")
    assert theirs.polars("pairs").equals(ours.polars("pairs"))
    assert theirs.digest != ours.digest
    given = ("--completions", sampled.path, "--reward", "tests.e2e.letters:most_letters", "--gap-filter", "none")
    done = call("build-pairs", *given, "--rule", f"{USER}:best_worst", "--out", tmp_path / "cli")
    assert done.code == 0, done.stderr
    assert prefpipe.load(tmp_path / "cli").digest == theirs.digest
