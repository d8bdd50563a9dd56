"""The tables of `iterate` hold what a user may choose; the links between stages are not theirs to set."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from prefpipe.config import base
from prefpipe.config.iterate import IterateConfig
from prefpipe.errors import UsageError
from prefpipe.stages.iterate import plan
from prefpipe.stages.iterate.plan import Known

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
    *_, train, _ = plan.steps(fitting, Path("o"), 2, Known())
    assert train.config.labels == ("o/round-2/build-pairs",)  # type: ignore[attr-defined]  # of any command
    assert train.config.pairs == ()  # type: ignore[attr-defined]  # of any command
    with pytest.raises(UsageError, match="for TRL"):
        base.load(IterateConfig, None, {"build_pairs.format": "trl"})


def test_at_least_one_round() -> None:
    with pytest.raises(ValidationError):
        IterateConfig(rounds=0)


def test_tables_have_the_names_of_the_commands_but_for_the_stop_rules() -> None:
    tables = {name.partition(".")[0] for name, _ in base.fields(IterateConfig) if "." in name}
    assert tables == {"generate", "build_pairs", "train", "evaluate", "stop"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reference": "last"}, "reference = 'last'"),
        ({"reference": "fixed:"}, "reference = 'fixed:'"),
        ({"reference": "best", "train.loss_type": ["simpo"]}, "reference = best is read by none of simpo"),
        ({"learning_rates": ["1e-5"], "train.learning_rate": "1e-4"}, "learning_rates sets train.learning_rate"),
        ({"betas": ["0.1"], "build_pairs.beta": "0.2"}, "betas sets build_pairs.beta in every round"),
        ({"betas": ["0.3"], "train.loss_type": ["nll"]}, "betas: beta = 0.3 is read"),
        ({"temperatures": ["0.7", "3"]}, "temperatures.1 = '3'"),
        ({"prompts_per_round": "5", "generate.part": "1/2"}, "leave out part = 1/2"),
        ({"from_round": "1"}, "from_round = 1 is a round of from_run"),
        ({"from_run": "x", "from_round": "2"}, "rounds = 2 ends before the first round behind from_round = 2"),
        ({"replay": "1.5"}, "replay = '1.5'"),
        ({"replay_rounds": "3"}, "replay_rounds = 3 is read with replay"),
        ({"optimizer": "continue", "start": "base"}, "and start = base does not"),
        ({"launcher": ""}, "launcher = ''"),
        ({"stop.rules": ["gains"]}, "did you mean 'gain'?"),
        ({"stop.gain_rounds": "0"}, "stop.gain_rounds = '0'"),
    ],
)
def test_rounds_that_do_not_fit_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        base.load(IterateConfig, None, values)
    assert message in caught.value.message
