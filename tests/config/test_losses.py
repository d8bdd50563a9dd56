"""The table of losses: what an objective of them needs, what its settings must be, where names come from."""

import math

import pytest
from pydantic import ValidationError

from prefpipe.config import losses
from prefpipe.config.losses import LOSSES, LossSettings, Objective, class_weights, in_class_ratio
from prefpipe.config.train import TrainConfig


def objective(**given: object) -> Objective:
    return TrainConfig.model_validate(given).objective


def test_the_objective_of_a_config() -> None:
    found = objective(loss_type=("sigmoid", "nll"), loss_weights=(1.0, 0.5), beta=0.3, nll_scope="prompt_response")
    settings = LossSettings(beta=0.3, nll_scope="prompt_response")
    assert found == Objective(("sigmoid", "nll"), (1.0, 0.5), settings)
    assert found.with_reference() == Objective(("sigmoid",), (1.0,), settings)


def test_settings_of_losses_are_settings_of_train_with_the_same_defaults() -> None:
    assert TrainConfig().objective.settings == LossSettings()
    for name, field in LossSettings.model_fields.items():
        assert TrainConfig.model_fields[name].default == field.default


@pytest.mark.parametrize(
    ("names", "kind", "needs"),
    [
        (("sigmoid",), "pairs", {"reference"}),
        (("nll", "simpo"), "pairs", set()),
        (("nll", "odpo"), "pairs", {"reference", "reward_gap"}),
        (("soft",), "pairs", {"reference", "preference_prob"}),
        (("kto",), "labels", {"reference", "z0"}),
        (("apo_zero_unpaired",), "labels", {"reference"}),
        (("plackett_luce",), "groups", {"reference"}),
    ],
)
def test_kind_and_needs(names: tuple[str, ...], kind: str, needs: set[str]) -> None:
    found = objective(loss_type=names, loss_weights=(1.0,) * len(names))
    assert found.kind == kind
    assert {need for need in ("reference", "preference_prob", "reward_gap", "z0") if found.needs(need)} == needs


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loss_type": ("sigmoid", "kto"), "loss_weights": (1.0, 1.0)}, "different kinds of rows do not add up"),
        ({"loss_type": ("ipo", "ipo"), "loss_weights": (1.0, 1.0)}, "a loss twice in loss_type"),
        ({"loss_type": (), "loss_weights": ()}, "at least 1 item"),
        ({"loss_type": ("sigmoid",), "dpop_lambda": 3.0}, "dpop_lambda = 3.0 is read by none of sigmoid (dpop)"),
        ({"loss_type": ("nll",), "beta": 0.3}, "beta = 0.3 is read by none of nll (sigmoid, "),
        ({"loss_type": ("kto",), "use_weighting": True}, "use_weighting = True is read by none of kto"),
        ({"kl_rows": 4}, "kl_rows = 4 is read by none of sigmoid (kto)"),
        ({"loss_type": ("exo_pair",)}, "exo_pair needs label_smoothing above 0: its paper uses 1e-3"),
        ({"loss_type": ("simpo",), "beta": 2.0, "simpo_gamma": 5.0}, "a margin gamma / beta of 2.5 nats per token"),
        ({"loss_type": ("simpo",), "simpo_gamma": 0.1, "simpo_gamma_beta_ratio": 0.3}, "two names of one margin"),
        ({"loss_type": ("sigmod",)}, "Input should be 'sigmoid', 'sigmoid_norm', "),
    ],
)
def test_what_does_not_go_together_is_told(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate(given)
    assert said in str(caught.value)


def test_help_takes_the_names_of_losses_from_the_table() -> None:
    fields = TrainConfig.model_fields
    assert all(name in (fields["loss_type"].description or "") for name in LOSSES)
    for setting in ("simpo_gamma", "margin_alpha", "kl_rows"):
        assert (fields[setting].description or "").startswith(f"{', '.join(losses.readers(setting))}: ")
    assert (fields["labels"].description or "").startswith(f"For {', '.join(losses.names('labels'))}: ")


def test_columns_and_settings_of_constraints_are_read_by_the_loss() -> None:
    for loss in LOSSES.values():
        assert loss.logarithm_of.keys() <= set(loss.needs)
        assert loss.settings_above_0.keys() <= set(loss.settings)
        loss.target.format(beta=0.1, one="", half="", margin=0.5)


@pytest.mark.parametrize("desirable", [1, 7, 100, 125, 150, 151, 9000])
def test_class_weights_bring_the_ratio_to_5_over_4(desirable: int) -> None:
    """lambda_D n_D / (lambda_U n_U), with one of the weights 1 and none below 1."""
    up, down = class_weights(desirable, 100)
    assert up * desirable / (down * 100) == pytest.approx(1.25)
    assert min(up, down) == 1.0


@pytest.mark.parametrize(
    ("ratio", "inside"), [(0.999, False), (1.0, True), (1.5, True), (1.501, False), (math.inf, False)]
)
def test_the_class_ratio_of_kto_is_from_1_to_3_over_2(ratio: float, inside: bool) -> None:
    assert in_class_ratio(ratio) == inside
