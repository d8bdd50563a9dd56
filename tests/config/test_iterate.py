"""The tables of `iterate` hold what a user may choose; the links between stages are not theirs to set."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from prefpipe.config import base
from prefpipe.config.iterate import IterateConfig
from prefpipe.errors import UsageError
from prefpipe.stages.iterate import stage as iterate

LINKS = {
    "generate.model": "m",
    "generate.adapter": "a",
    "generate.reference": "base",
    "build_pairs.completions": ["runs/g"],
    "build_pairs.reward_runs": ["runs/g"],
    "build_pairs.ref_logps": ["runs/g"],
    "build_pairs.policy_logps": ["runs/g"],
    "train.model": "m",
    "train.adapter": "a",
    "train.pairs": ["runs/p"],
    "train.reference_model": "m",
    "train.reference_adapter": "a",
    "evaluate.model": "m",
    "evaluate.adapter": "a",
    "evaluate.round": "3",
}
READERS = {
    "build_pairs.policy_logps": {"build_pairs.subset": "small-implicit-gap"}
}  # without it nothing reads the link


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_refused_by_name(name: str) -> None:
    table, _, leaf = name.partition(".")
    with pytest.raises(UsageError, match=rf"remove {leaf} from \[{table}\]"):
        base.load(IterateConfig, None, {name: LINKS[name], **READERS.get(name, {})})


def test_all_links_of_a_table_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"remove model, adapter from \[train\]"):
        base.load(IterateConfig, None, {"train.model": "m", "train.adapter": "a"})


def test_every_other_setting_of_a_table_is_free() -> None:
    loaded = base.load(IterateConfig, None, {"generate.limit": "3", "evaluate.split": "all", "train.seed": "4"})
    assert (loaded.generate.limit, loaded.evaluate.split, loaded.train.seed) == (3, "all", 4)


def test_a_link_at_its_default_may_be_written() -> None:
    assert base.load(IterateConfig, None, {"train.adapter": "none"}) == IterateConfig()


def test_rows_are_those_that_the_loss_trains_on() -> None:
    with pytest.raises(UsageError, match=r'loss kto trains on labels: set output = "labels" in \[build_pairs\]'):
        base.load(IterateConfig, None, {"train.loss_type": ["kto"]})
    fitting = base.load(IterateConfig, None, {"train.loss_type": ["kto"], "build_pairs.output": "labels"})
    *_, train, _ = iterate.steps(fitting, Path("o"))
    assert train.config.labels == ("o/round-2/build-pairs",)  # type: ignore[attr-defined]  # of any command
    assert train.config.pairs == ()  # type: ignore[attr-defined]  # of any command
    with pytest.raises(UsageError, match="for TRL"):
        base.load(IterateConfig, None, {"build_pairs.format": "trl"})


def test_at_least_one_round() -> None:
    with pytest.raises(ValidationError):
        IterateConfig(rounds=0)


def test_tables_have_the_names_of_the_commands() -> None:
    tables = {name.partition(".")[0] for name, _ in base.fields(IterateConfig) if "." in name}
    assert tables == {"generate", "build_pairs", "train", "evaluate"}
