"""Keyword arguments become settings as the command line has them."""

from pathlib import Path
from typing import Any

import pytest

from prefpipe.api import keywords
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.config.generate import GenerateConfig
from prefpipe.config.iterate import IterateConfig
from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError
from tests.rewards.limited import behave

LAMBDA = lambda **_: [1.0]  # noqa: E731


@pytest.mark.parametrize(
    ("cls", "given", "expected"),
    [
        (TrainConfig, {"pairs": Path("p")}, {"pairs": ["p"]}),
        (TrainConfig, {"pairs": [Path("p"), "q"]}, {"pairs": ["p", "q"]}),
        (TrainConfig, {"loss_type": "ipo", "loss_weights": 0.5}, {"loss_type": ["ipo"], "loss_weights": [0.5]}),
        (TrainConfig, {"beta": 0.2, "unknown": 1}, {"beta": 0.2, "unknown": 1}),
        (GenerateConfig, {"rewards": behave}, {"rewards": ["tests.rewards.limited:behave"]}),
        (BuildPairsConfig, {"reward": behave}, {"reward": "tests.rewards.limited:behave"}),
        (
            GenerateConfig,
            {"reward_settings": {"r": {"kind": "function", "function": behave}}},
            {"reward_settings": {"r": {"kind": "function", "function": "tests.rewards.limited:behave"}}},
        ),
        (
            IterateConfig,
            {"rounds": 3, "generate": {"rewards": [behave]}, "stop": {"rules": ["kl"]}, "train.beta": 1},
            {
                "rounds": 3,
                "generate.rewards": ["tests.rewards.limited:behave"],
                "stop.rules": ["kl"],
                "train.beta": 1,
            },
        ),
    ],
)
def test_values_of_python_are_settings(cls: Any, given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert keywords.flags(cls, given) == expected


def test_a_lambda_is_refused_where_it_stands() -> None:
    for given in ({"generate": {"rewards": LAMBDA}}, {"generate": {"rewards": ["length", LAMBDA]}}):
        with pytest.raises(UsageError, match=r"reward <lambda> cannot be used: a lambda has no name"):
            keywords.flags(IterateConfig, given)
    with pytest.raises(UsageError, match="loss <lambda>"):
        keywords.flags(TrainConfig, {"loss_type": [LAMBDA]})
