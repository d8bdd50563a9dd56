"""What is said at the start: beta and targets in nats on the data, and settings that are out of reach."""

from pathlib import Path

import pytest

from prefpipe.config.losses import LOSSES, LossSettings, Objective
from prefpipe.stages.train import examples as train_rows
from prefpipe.stages.train.examples import TrainLabel, TrainPair
from prefpipe.stages.train.targets import targets
from tests.stages.train import data


def pair(chosen: int, rejected: int) -> TrainPair:
    return TrainPair("p", "c", "r", (1,), (2,) * chosen, (3,) * rejected, None, None, 1.0)


ROWS = [pair(40, 60)]  # 50 tokens on average


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "sigmoid: beta 0.1, a reward of 1 is 1/beta = 10 nats (0.2 per token at 50 tokens)"),
        ({"loss_type": ("ipo",)}, "ipo: h is drawn to 1/(2 beta) = 5 nats (0.1 per token at 50 tokens)"),
        ({"loss_type": ("ipo",), "ipo_reduction": "mean", "beta": 1.0}, "ipo: h is drawn to 1/(2 beta) = 0.5 nats per"),
        ({"loss_type": ("simpo",), "beta": 2.0}, "simpo: beta 2, target margin gamma / beta = 0.5 nats per token"),
        ({"loss_type": ("simpo",), "beta": 2.0, "simpo_gamma": 0.8}, "gamma / beta = 0.4 nats per token"),
        ({"loss_type": ("sigmoid_norm",), "beta": 5.0}, "a reward of 1 is 1/beta = 0.2 nats per token"),
        ({"loss_type": ("sppo_hard",)}, "+-1/(2 beta) = 5 nats (0.1 per token"),
        ({"label_smoothing": 0.1}, "sigmoid: label_smoothing 0.1 stops it at 21.97 nats (0.439 per token"),
        ({"loss_type": ("exo_pair",), "label_smoothing": 1e-3}, "label_smoothing 0.001 stops it at 69.07 nats"),
    ],
)  # fmt: skip
def test_lines(changes: dict[str, object], expected: str):
    found = targets(data.config(Path(), **changes).objective, ROWS)
    assert any(expected in line for line in found.lines), found.lines
    assert found.warnings == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"beta": 0.004}, "beta 0.004 is below 0.005"),
        ({"loss_type": ("sigmoid_norm",), "beta": 0.4}, "beta 0.4 is below 0.5"),
        ({"loss_type": ("simpo",)}, "beta 0.1 is below 0.5"),
        ({"loss_type": ("ipo",), "ipo_reduction": "mean"}, "a target of 5 nats per token is out of reach"),
        ({"loss_type": ("ipo",), "beta": 0.004}, "raise beta to 0.005 or more"),
    ],
)
def test_warnings(changes: dict[str, object], expected: str):
    found = targets(data.config(Path(), **changes).objective, ROWS).warnings
    assert any(expected in line for line in found), found


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_with_a_temperature_says_what_it_aims_at(name: str):
    found = targets(Objective((name,), (1.0,), LossSettings(beta=5.0)), ROWS)
    assert [line.partition(": ")[0] for line in found.lines] == ([name] if LOSSES[name].target else [])
    assert found.warnings == []


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.target])
def test_every_loss_with_a_temperature_warns_when_it_is_far_too_low(name: str):
    (line,) = targets(Objective((name,), (1.0,), LossSettings(beta=1e-4)), ROWS).warnings
    assert line.startswith(f"{name}: ")


def test_losses_without_beta_say_nothing():
    found = targets(data.config(Path(), loss_type=("nll",)).objective, ROWS)
    assert (found.lines, found.warnings) == ([], [])


def labels(desirable: int, undesirable: int) -> list[TrainLabel]:
    (row, *_) = train_rows.from_labels(data.labels_of(data.bare_pairs(1)))
    return [
        TrainLabel(str(n), row.prompt_ids, row.completion, n < desirable, 1.0) for n in range(desirable + undesirable)
    ]


def kto(**changes: object) -> dict[str, object]:
    return {"loss_type": ("kto",), **changes}


@pytest.mark.parametrize(("desirable", "undesirable"), [(10, 10), (15, 10), (12, 10)])
def test_the_ratio_rule_holds_from_1_to_3_over_2(desirable: int, undesirable: int):
    assert targets(data.config(Path(), **kto()).objective, labels(desirable, undesirable)).class_warnings == []


@pytest.mark.parametrize(
    ("desirable", "undesirable", "expected"),
    [
        (1, 10, "ratio of 0.1, outside of [1, 1.5]: --desirable-weight 12.5 alone"),
        (30, 10, "ratio of 3, outside of [1, 1.5]: --undesirable-weight 2.4 alone"),
        (9, 10, "--desirable-weight 1.389 alone"),
    ],
)
def test_outside_of_it_weights_are_proposed_that_keep_it(desirable: int, undesirable: int, expected: str):
    rows = labels(desirable, undesirable)
    (found,) = targets(data.config(Path(), **kto()).objective, rows).class_warnings
    assert expected in found
    flag, value = expected.rsplit("--", 1)[1].split()[:2]
    better = data.config(Path(), **kto(**{flag.replace("-", "_"): float(value)}))
    assert targets(better.objective, rows).class_warnings == []


@pytest.mark.parametrize(("desirable", "undesirable", "lacking"), [(4, 0, "undesirable"), (0, 4, "desirable")])
def test_a_class_without_rows_is_named(desirable: int, undesirable: int, lacking: str):
    (found,) = targets(data.config(Path(), **kto()).objective, labels(desirable, undesirable)).class_warnings
    assert f"no row is {lacking}" in found
