"""Names of ours or functions of users: checked by their form, imported by nobody here."""

import pytest
from pydantic import ValidationError

from prefpipe.config import base
from prefpipe.config.build_pairs import BuildPairsConfig, unread
from prefpipe.config.names import is_function
from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("mine:loss", True), ("pack.age_2.mine:_loss", True), ("__main__:f", True), ("sigmoid", False),
        ("mine:", False),
        (":f", False), ("a b:f", False), ("mine:f.g", False), ("mine:f:g", False), ("https://x", False),
    ],
)  # fmt: skip
def test_the_form_of_a_function(name: str, is_one: bool) -> None:
    assert is_function(name) == is_one


def test_a_function_stands_where_a_name_may(recwarn: pytest.WarningsRecorder) -> None:
    train = TrainConfig(loss_type=("mine:f", "nll"), loss_weights=(1.0, 1.0))
    assert base.dump(train)["loss_type"] == ["mine:f", "nll"]
    assert train.objective.kind == "pairs"
    assert TrainConfig(loss_type=("mine:f",), labels=("l",)).objective.kind == "labels"
    assert TrainConfig(loss_type=("mine:f", "kto"), loss_weights=(1.0, 1.0)).objective.kind == "labels"
    assert BuildPairsConfig(rule="mine:f", top_k=3, rule_gap=0.1).rule == "mine:f"
    assert not recwarn.list
    assert not {"top_k", "rule_gap"} & set(unread(dict(BuildPairsConfig(rule="mine:f"))))


@pytest.mark.parametrize("name", ["sigmod", "mine", "mine:"])
def test_any_other_name_is_an_error_with_the_nearest(name: str) -> None:
    with pytest.raises(UsageError, match=f"loss_type.0 = '{name}' is not one of 'sigmoid', .*'module:function'"):
        base.load(TrainConfig, None, {"loss_type": [name]})
    with pytest.raises(UsageError, match=r"did you mean 'best-worst'"):
        base.load(BuildPairsConfig, None, {"rule": "best-wrst"})


@pytest.mark.parametrize("setting", ["use_weighting", "kl_rows", "kl_bank_size"])
def test_what_no_function_reads_is_refused(setting: str) -> None:
    given = {"loss_type": ("mine:f",), "labels": ("l",), setting: True if setting == "use_weighting" else 3}
    with pytest.raises(ValidationError, match=f"{setting} = .* is read by none of mine:f"):
        TrainConfig.model_validate(given)
