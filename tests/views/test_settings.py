"""Settings by dotted name, against the defaults and between runs."""

from prefpipe.config.base import dump
from prefpipe.config.iterate import IterateConfig
from prefpipe.config.train import TrainConfig
from prefpipe.views import settings


def test_only_what_is_not_the_default_is_changed() -> None:
    assert settings.changed(TrainConfig, dump(TrainConfig())) == {}
    config = TrainConfig(beta=0.3, pairs=("a",))
    assert settings.changed(TrainConfig, dump(config)) == {"beta": 0.3, "pairs": ["a"]}
    rounds = IterateConfig(train=TrainConfig(beta=0.3))
    assert settings.changed(IterateConfig, dump(rounds)) == {"train.beta": 0.3}


def test_a_setting_of_another_version_is_shown() -> None:
    assert settings.changed(TrainConfig, {"gone": 1}) == {"gone": 1}


def test_runs_differ_where_one_value_is_another_or_missing() -> None:
    found = settings.differing([{"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, {"a": 1}])
    assert found == {"b.c": [2, 3, None]}
