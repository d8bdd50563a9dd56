"""Several rewards in one run: the first decides, the others are reported, and can be asked for later."""

from pathlib import Path

import pytest

from prefpipe.runs import store
from prefpipe.schemas import Reward
from tests.conftest import Call, Write
from tests.stages.evaluate.cases import config, prompts_file, rows_of, run

TOKENS = {"short": {"kind": "length", "unit": "tokens", "min": 1, "max": 40}}


def test_the_first_decides_and_the_others_stand_beside(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    path = prompts_file(write, 5)
    rewards = ("short_sentence", "short", "repetition")
    manifest = run(config(tiny_model, path, reward=rewards, reward_settings=TOKENS), tmp_path / "e")
    alone = run(config(tiny_model, path), tmp_path / "alone")
    assert manifest["totals"]["greedy"] == alone["totals"]["greedy"]
    assert list(manifest["totals"]["rewards"]) == list(rewards)
    (folder,) = (tmp_path / "e" / "rewards" / "short").iterdir()
    table = store.read_dataset(tmp_path / "e", f"rewards/short/{folder.name}", Reward).to_pylist()
    rows = {row.completion_id: row for row in rows_of(tmp_path / "e")}
    for rated in table:  # min(1, 40 / tokens)
        assert rated["reward"] == pytest.approx(min(1, 40 / len(rows[rated["completion_id"]].token_ids)))
    sampled = [r["reward"] for r in table if rows[r["completion_id"]].decoding == "sampled"]
    found = manifest["totals"]["rewards"]["short"]["sampled"]
    assert found["mean"] == pytest.approx(sum(sampled) / len(sampled))
    assert found["low"] < found["mean"] < found["high"]


def test_a_reward_that_is_asked_for_later_samples_nothing_again(
    tiny_model: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prompts_file(write, 5)
    first = run(config(tiny_model, path), tmp_path / "e")
    capsys.readouterr()
    more = run(config(tiny_model, path, reward=("short_sentence", "length")), tmp_path / "e")
    assert "starting engine" not in capsys.readouterr().err
    assert {n: f for n, f in more["files"].items() if n in first["files"] and "measures" not in n} == {
        n: f for n, f in first["files"].items() if "measures" not in n
    }
    assert list(more["totals"]["rewards"]) == ["short_sentence", "length"]
    assert run(config(tiny_model, path, reward=("short_sentence", "length")), tmp_path / "e") == more
    assert "is complete already" in capsys.readouterr().err


def test_another_table_of_the_same_name_rates_anew(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    path = prompts_file(write, 3)

    def mean(most: int) -> float:
        tables = {"short": {**TOKENS["short"], "max": most}}
        settings = config(tiny_model, path, reward=("short_sentence", "short"), reward_settings=tables)
        return run(settings, tmp_path / "e")["totals"]["rewards"]["short"]["greedy"]["mean"]

    assert mean(1) < mean(10) < mean(1000) == 1


def test_the_command_line_repeats_the_flag(call: Call, tiny_model: Path, write: Write, tmp_path: Path) -> None:
    common = ("evaluate", "--model", tiny_model, "--prompts", prompts_file(write, 3), "--engine", "fake")
    done = call(*common, "--reward", "short_sentence", "--reward", "repetition", "--out", tmp_path / "e")
    assert done.code == 0, done.stderr
    recipe = tmp_path / "r.toml"
    recipe.write_text('reward = "short_sentence"\n')  # as recipes of before have it
    done = call(*common[:1], recipe, *common[1:], "--out", tmp_path / "old")
    assert done.code == 0, done.stderr
    done = call(*common[:1], tmp_path / "old" / "config.json", "--out", tmp_path / "old")
    assert "is complete already" in done.stderr
