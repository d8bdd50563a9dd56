"""Evaluations of variants: length, win rate and its pairing come from evaluate; the initial policy is the baseline."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import UsageError
from prefpipe.runs import store
from prefpipe.stages.iterate.runners import Runner
from prefpipe.stages.sweep import evaluations, stage
from tests.stages.iterate.cases import REWARD, in_process, write_prompts
from tests.stages.sweep.cases import config


def recipe(folder: Path, **changes: Any) -> Path:
    settings = {"prompts": str(write_prompts(folder / "prompts.jsonl")), "engine": "fake", "dtype": "float32",
                "max_tokens": 8, "num_samples": 2, "reward": [REWARD], "pass_reward": 0.8, **changes}  # fmt: skip
    path = folder / "evaluate.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.slow
def test_a_sweep_with_an_evaluation(tiny_model: Path, pairs: Path, tmp_path: Path):
    """The fake engine answers alike for every policy: win rates are one half, and no variant is told apart."""
    asked = list[str]()

    def runner(command: str, saved: Path, out: Path) -> None:
        asked.append(out.name)
        in_process(command, saved, out)

    sweep = config(
        tiny_model, pairs, "beta=0.1,0.3", evaluate=str(recipe(tmp_path)), metric_for_best_variant="win_rate",
        eval_split=0.0, eval_steps=50,
    )  # fmt: skip
    manifest = stage.run(sweep, tmp_path / "s", force=False, runner=runner)
    assert asked == ["start", "beta-0.1", "beta-0.3"]
    values = {row["name"]: row["values"] for row in manifest["totals"]["variants"]}
    for name, numbers in values.items():
        evaluation = store.read_manifest(tmp_path / "s" / "evaluations" / name)
        assert numbers["win_rate"]["value"] == evaluation["totals"]["comparisons"][0]["greedy"]["win_rate"]
        assert numbers["length"]["value"] == evaluation["totals"]["greedy"]["mean_tokens"]
        assert (
            evaluation["identity"]["policy"]
            == store.read_manifest(tmp_path / "s" / "variants" / name)["identity"]["policy"]
        )
    assert manifest["totals"]["best"]["metric"] == "win_rate"
    again = stage.run(sweep, tmp_path / "s", force=False, runner=refuse)
    assert again == manifest


def refuse(command: str, saved: Path, out: Path) -> None:
    raise AssertionError(f"{command} was run again")


def test_policies_are_named_by_their_tuning(tiny_model: Path, pairs: Path, tmp_path: Path):
    sweep = config(tiny_model, pairs, "tuning=lora,full", lora_r=16, lora_alpha=32, evaluate=str(recipe(tmp_path)))
    table = evaluations.read(sweep)
    assert table is not None
    saved = dict[str, dict[str, Any]]()

    def runner(command: str, path: Path, out: Path) -> None:
        saved[out.name] = json.loads(path.read_text())["config"]

    step: Runner = runner
    evaluations.run(sweep, table, sweep.variants, tmp_path / "s", step)
    variants = tmp_path / "s" / "variants"
    assert (saved["start"]["model"], saved["start"]["adapter"]) == (str(tiny_model), "none")
    assert saved["tuning-lora"]["adapter"] == str(variants / "tuning-lora" / "adapter")
    assert saved["tuning-full"]["model"] == str(variants / "tuning-full" / "model")
    assert saved["start"]["baseline"] == []
    assert saved["tuning-full"]["baseline"] == [str(evaluations.start(tmp_path / "s"))]


def test_a_recipe_without_prompts_or_reward_is_refused(tiny_model: Path, pairs: Path, tmp_path: Path):
    assert evaluations.read(config(tiny_model, pairs, "beta=0.1,0.2")) is None
    sweep = config(tiny_model, pairs, "beta=0.1,0.2", evaluate=str(recipe(tmp_path, reward=[])))
    with pytest.raises(UsageError, match="no prompts or no reward"):
        evaluations.read(sweep)
