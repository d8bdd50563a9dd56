"""Guards: a policy that got worse on other prompts, by more than the interval, is a failure."""

import json
from pathlib import Path

import pytest

from prefpipe.config.evaluate import EvaluateConfig, parse_guard
from prefpipe.statistics import wilson
from tests.conftest import Call, Write
from tests.stages.evaluate.cases import config, prompts_file, rows_of, run, summary


@pytest.mark.parametrize(
    ("text", "prompts", "reward"),
    [
        ("a.jsonl:length", "a.jsonl", "length"),
        ("a.jsonl:mine.rewards:good", "a.jsonl", "mine.rewards:good"),
        ("a.jsonl:my-table", "a.jsonl", "my-table"),
        ("hf:owner/name@main:math", "hf:owner/name@main", "math"),
        ("hf:owner/name:config/split:my-table", "hf:owner/name:config/split", "my-table"),
        ("odd:name.jsonl:length", "odd:name.jsonl", "length"),
    ],
)
def test_a_guard_is_a_file_and_a_reward(text: str, prompts: str, reward: str) -> None:
    assert parse_guard(text, {"my-table"}) == (prompts, reward)


@pytest.mark.parametrize("text", ["length", "a.jsonl:", ":length", "a.jsonl:lenght", "a.jsonl"])
def test_other_texts_are_no_guard(text: str) -> None:
    with pytest.raises(ValueError, match=r"FILE:REWARD|no such reward"):
        EvaluateConfig(guard=(text,))


def test_a_guard_has_answers_of_its_own(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    """Greedy ones only; prompts may be among those of the evaluation, and a faulty one is in the ledger."""
    path = prompts_file(write, 4)
    other = write({"prompt": "one"}, {"prompt": "spells <|im_start|>"}, {"prompt": "three"}, name="guard.jsonl")
    settings = config(tiny_model, path, guard=(f"{other}:length", f"{path}:keyword"))
    manifest = run(settings, tmp_path / "e")
    first, second = manifest["totals"]["guards"]
    assert (first["prompts"], first["reward"], first["answers"], first["drops"]) == (str(other), "length", 2, [])
    assert (first["pass"], (first["low"], first["high"])) == (1.0, wilson([True, True]))
    assert (second["answers"], second["pass"], second["mean_reward"]) == (4, 0.0, 0.0)
    rows = rows_of(tmp_path / "e", first["dataset"])
    assert [(r.messages[0]["content"], r.name, r.decoding) for r in rows] == [
        ("one", "length", "greedy"), ("three", "length", "greedy"),
    ]  # fmt: skip
    alone = run(config(tiny_model, path), tmp_path / "alone")
    assert {**manifest["totals"], "guards": None} == {**alone["totals"], "guards": None}
    assert run(settings, tmp_path / "e") == manifest
    assert run(config(tiny_model, path), tmp_path / "e")["totals"] == alone["totals"]


def test_a_split_of_a_guard(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    settings = config(tiny_model, prompts_file, guard=(f"{prompts_file}:length",), guard_split="train")
    (found,) = run(settings, tmp_path / "e")["totals"]["guards"]
    assert found["answers"] == 6


def test_a_drop_beyond_its_interval_has_failed(call: Call, tiny_model: Path, write: Write, tmp_path: Path) -> None:
    """A reward of the user that passes all that the first policy says and little of what a shorter one does."""
    path, other = prompts_file(write, 3), prompts_file(write, 25, "guard.jsonl", "guard")
    tables = json.dumps({"long": {"kind": "length", "unit": "tokens", "min": 19, "max": 500}})
    common = ("evaluate", "--model", tiny_model, "--prompts", path, "--engine", "fake", "--reward", "repetition")
    common = (*common, "--guard", f"{other}:long", "--reward-settings", tables, "--baseline")
    plain = common[:-1]
    assert call(*plain, "--max-tokens", "60", "--out", tmp_path / "a").code == 0
    for out, flags, failed in (("same", ("60", "--seed", "4"), False), ("worse", ("9",), True)):
        done = call(*common, tmp_path / "a", "--max-tokens", *flags, "--out", tmp_path / out)
        assert done.code == 0, done.stderr
        ((drop,),) = (
            guard["drops"] for guard in json.loads((tmp_path / out / "manifest.json").read_text())["totals"]["guards"]
        )
        assert drop["baseline"] == json.loads((tmp_path / "a/manifest.json").read_text())["digest"]
        assert drop["failed"] == failed
        assert (drop["high"] < 0) == failed
        assert (f"the policy got worse: guard {other}:long against {tmp_path / 'a'}" in done.stderr) == failed
        assert ("FAILED" in summary(tmp_path / out)) == failed
    assert drop["difference"] == -1.0


def test_a_baseline_without_the_guard_is_said(
    tiny_model: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prompts_file(write, 3)
    run(config(tiny_model, path, guard=(f"{path}:length",)), tmp_path / "a")
    for reward, compared in (("length", 1), ("repetition", 0)):
        settings = config(tiny_model, path, seed=2, guard=(f"{path}:{reward}",), baseline=(str(tmp_path / "a"),))
        (found,) = run(settings, tmp_path / reward)["totals"]["guards"]
        assert len(found["drops"]) == compared
        assert ("to compare with" in capsys.readouterr().err) == (not compared)


def test_a_guard_has_a_threshold_of_its_own(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    """One for all guards, or one for each; without any that of the reward that decides. Nothing is sampled again."""
    path = prompts_file(write, 6)
    common = {"guard": (f"{path}:length", f"{path}:repetition"), "pass_reward": 0.9}
    found: dict[tuple[float, ...], list[float]] = {}
    for thresholds in ((), (1.5,), (1.5, 0.5), (0.9,)):
        totals = run(config(tiny_model, path, **common, guard_pass_reward=thresholds), tmp_path / "e")["totals"]
        found[thresholds] = [guard["pass"] for guard in totals["guards"]]
        assert [guard["mean_reward"] for guard in totals["guards"]] == [1.0, 1.0]
    assert found == {(): [1.0, 1.0], (1.5,): [0.0, 0.0], (1.5, 0.5): [0.0, 1.0], (0.9,): [1.0, 1.0]}
    assert len([*(tmp_path / "e").glob("guards/*/evaluations/*.parquet")]) == 6  # two guards, three shards each


def test_thresholds_are_one_or_as_many_as_guards() -> None:
    with pytest.raises(ValueError, match="guard_pass_reward has 2 values for 1 guards"):
        EvaluateConfig(guard=("a.jsonl:length",), guard_pass_reward=(0.5, 0.5))
