"""The shipped recipes of rounds run as they are written, on a model and with numbers that are small."""

from pathlib import Path

import pytest

from prefpipe.config import base
from prefpipe.config.iterate import IterateConfig
from prefpipe.inference import warm
from prefpipe.runs import store
from prefpipe.stages.iterate import stage
from tests.conftest import ROOT
from tests.stages.iterate.cases import NO_STOPS, REWARD, in_process

SMALL = {
    **{f"generate.{name}": value for name, value in {"rewards": [REWARD], "check": 0}.items()},
    **{f"{table}.engine": "transformers" for table in ("generate", "evaluate")},
    **{f"{table}.dtype": "float32" for table in ("generate", "train", "evaluate")},
    **{f"{table}.max_tokens": 8 for table in ("generate", "evaluate")},
    **{f"{table}.prompts": str(ROOT / "data/prompts.jsonl") for table in ("generate", "evaluate")},
    **{f"{table}.reward": REWARD for table in ("build_pairs", "evaluate")},
    "build_pairs.truncated_chosen": "keep",
    "train.lora_r": 2,
    "evaluate.limit": 2,
    "stop": NO_STOPS,
    "rounds": 3,
    "prompts_per_round": 2,
    "generate.num_samples": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fresh-prompts", "from-base", "semi-online"])
def test_a_recipe_runs_to_its_end(name: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = ROOT / "stages" / "iterate" / f"{name}.toml"
    written = base.load(IterateConfig, recipe, {})
    config = base.load(IterateConfig, recipe, {**SMALL, "model": str(tiny_model)})
    kept = ("reference", "start", "optimizer", "replay", "replay_rounds", "repeat_prompts", "evaluate_every")
    for setting in (*kept, "learning_rates"):
        assert getattr(config, setting) == getattr(written, setting)
    with warm.shelf(lora_rank=2) as shelf:
        shelf.keep = True
        manifest = stage.run(config, tmp_path / "out", force=False, runner=in_process)
    evaluated = [totals["round"] for totals in manifest["totals"]["rounds"]]
    assert evaluated == ([0, 3] if written.evaluate_every > 1 else [0, 1, 2, 3])
    trained = [store.read_manifest(tmp_path / f"out/round-{n}/train")["totals"]["pairs"] for n in (1, 2, 3)]
    assert all(trained)
    if config.replay == 1:
        assert trained[0] < trained[1] < trained[2]
    inputs = store.read_manifest(tmp_path / "out/round-3/train")["inputs"]
    assert ("optimizer_from" in inputs) == (config.optimizer == "continue")
    assert (tmp_path / "out/round-3/replay").is_dir() == (0 < config.replay < 1)
