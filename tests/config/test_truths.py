"""True is no number, wherever a recipe says it."""

import pytest

from prefpipe.config import base, truths
from prefpipe.config.evaluate import EvaluateConfig
from prefpipe.config.iterate import IterateConfig
from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError


@pytest.mark.parametrize(
    ("cls", "given", "name"),
    [
        (TrainConfig, {"learning_rate": True}, "learning_rate"),
        (TrainConfig, {"seed": False}, "seed"),
        (TrainConfig, {"loss_type": ["sigmoid", "nll"], "loss_weights": [0.5, True]}, "loss_weights.1"),
        (IterateConfig, {"train": {"beta": True}}, "train.beta"),
        (EvaluateConfig, {"reward_settings": {"short": {"kind": "length", "max": True}}}, "short.max"),
    ],
)
def test_true_in_place_of_a_number_is_refused_by_name(
    cls: type[TrainConfig], given: dict[str, object], name: str
) -> None:
    with pytest.raises(UsageError, match=rf"{name} = true or false: a number belongs here"):
        base.load(cls, None, given)


def test_truth_values_and_numbers_where_they_belong_are_taken() -> None:
    given = {"merge": True, "use_rslora": False, "seed": 1, "loss_weights": [1], "report_to": []}
    config = base.load(TrainConfig, None, given)
    assert (config.merge, config.seed) == (True, 1)
    assert not list(truths.for_numbers({"a": [True, {"b": True}]}, {"a": [True, {"b": "x"}]}))
