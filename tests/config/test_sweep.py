"""The settings of a sweep are those of train and a few more; a train recipe is one of a sweep."""

from pathlib import Path

import pytest

from prefpipe.config import base
from prefpipe.config.sweep import SweepConfig
from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "stages" / "train").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_of_train_is_one_of_a_sweep(recipe: Path) -> None:
    loaded = base.load(SweepConfig, recipe, {"grid": ["learning_rate=1e-6,2e-6"]})
    first, second = loaded.variants
    train = base.load(TrainConfig, recipe, {})
    assert first.config == train.model_copy(update={"learning_rate": 1e-6})
    assert second.name == "learning_rate-2e-06"


def test_the_learning_rate_of_a_variant_is_a_number() -> None:
    loaded = SweepConfig(grid=("tuning=lora,full",))
    assert [variant.config.learning_rate for variant in loaded.resolved_variants] == [1e-5, 1e-6]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"grid": ["betta=1"]}, "unknown setting 'betta'"),
        ({"samples": 3}, "samples = 3 are drawn from a grid"),
        ({"grid": ["seed=0,1"], "halving": [0.5, 0.25]}, "every share must be larger"),
        ({"grid": ["seed=0,1"], "halving": [0.5], "metric_for_best_variant": "win_rate"}, "compares held-out pairs"),
        ({"grid": ["seed=0,1"], "halving": [1.0]}, "less than 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_read(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as error:
        base.load(SweepConfig, None, settings)
    assert said in error.value.message


def test_the_grid_is_no_part_of_what_identifies_a_sweep() -> None:
    """A wider grid goes on in the same directory; the settings below it do not."""
    narrow, wide = SweepConfig(grid=("seed=0,1",)), SweepConfig(grid=("seed=0,1,2",), samples=2)
    assert base.result_fields(narrow) == base.result_fields(wide) == base.result_fields(TrainConfig())
