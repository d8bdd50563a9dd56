"""True is no number, wherever a recipe says it; a path may begin with ~, and is never nothing."""

from pathlib import Path

import pytest

from prefpipe.config import base
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.iterate import IterateConfig
from prefpipe.config.train import TrainConfig
from prefpipe.config.values import booleans_for_numbers
from prefpipe.errors import UsageError


@pytest.mark.parametrize(
    ("cls", "values", "name"),
    [
        (TrainConfig, {"learning_rate": True}, "learning_rate"),
        (TrainConfig, {"seed": False}, "seed"),
        (TrainConfig, {"loss_type": ["sigmoid", "nll"], "loss_weights": [0.5, True]}, "loss_weights.1"),
        (IterateConfig, {"train": {"beta": True}}, "train.beta"),
        (EvaluateConfig, {"reward_settings": {"short": {"kind": "length", "max": True}}}, "short.max"),
    ],
)
def test_true_in_place_of_a_number_is_refused_by_name(
    cls: type[TrainConfig], values: dict[str, object], name: str
) -> None:
    with pytest.raises(UsageError, match=rf"{name} = true or false: a number belongs here"):
        base.load(cls, None, values)


def test_truth_values_and_numbers_where_they_belong_are_taken() -> None:
    values = {"merge": True, "use_rslora": False, "seed": 1, "loss_weights": [1], "report_to": []}
    config = base.load(TrainConfig, None, values)
    assert (config.merge, config.seed) == (True, 1)
    assert not list(booleans_for_numbers({"a": [True, {"b": True}]}, {"a": [True, {"b": "x"}]}))


def test_the_home_directory_stands_for_its_sign_in_paths_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "r.toml"
    recipe.write_text('[generate]\nprompts = "~/p.jsonl"\n[train]\nmetric_for_best_model = "eval_loss"\n')
    config = base.load(IterateConfig, recipe, {"model": "~", "train.seed": 1})
    assert (config.model, config.generate.prompts) == (str(tmp_path), f"{tmp_path}/p.jsonl")
    listed = base.load(TrainConfig, None, {"pairs": ["~/a", "hf://x/~/y", "b~"], "chat_template": "~x"})
    assert listed.pairs == (f"{tmp_path}/a", "hf://x/~/y", "b~")
    assert base.local_path("~/o") == tmp_path / "o"


@pytest.mark.parametrize(("name", "value"), [("pairs", [""]), ("pairs", ["a", ""]), ("model", ""), ("adapter", "")])
def test_a_path_of_no_text_is_refused(name: str, value: object) -> None:
    """As the shell gives it for "$PAIRS" that nobody set; the current folder would be read, or written to."""
    with pytest.raises(UsageError, match=f"{name} is empty"):
        base.load(TrainConfig, None, {name: value})
    with pytest.raises(UsageError, match="out is empty"):
        base.local_path("", "out")
