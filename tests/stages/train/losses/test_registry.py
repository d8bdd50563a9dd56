"""The registry, the weighted sum, and what is reported beside it."""

from dataclasses import fields

import pytest

from prefpipe.config.train import PAIR_LOSSES, READS, ROWS
from prefpipe.stages.train.losses.batch import LossSettings
from prefpipe.stages.train.losses.registry import LOSSES, combine
from tests.stages.train.cases import A, Recorder, beta, labels, pairs, ranks


def test_names_kinds_and_settings_are_those_of_the_config():
    assert set(READS) == set(LOSSES)
    assert {name: spec.kind for name, spec in LOSSES.items()} == ROWS
    assert set(PAIR_LOSSES) == {name for name, spec in LOSSES.items() if spec.kind == "pairs"}
    known = {f.name for f in fields(LossSettings)}
    assert known <= {setting for settings in READS.values() for setting in settings}


@pytest.mark.parametrize("name", [n for n, spec in LOSSES.items() if spec.kind != "pairs"])
def test_a_loss_of_labels_or_groups_reads_the_settings_that_its_config_says(name: str):
    recorder = Recorder(beta(0.1))
    batch = labels((-1.0, -2.0, True), (-1.0, -2.0, False)) if LOSSES[name].kind == "labels" else ranks([1.0, 2.0])
    LOSSES[name].fn(batch, recorder)
    assert recorder.read == set(READS[name]) & {f.name for f in fields(LossSettings)}


def test_combine_adds_weighted_losses():
    """DPO + NLL of A at beta 0.1: 0.403186 + 2 = 2.403186; with weights 0.5 and 3: 0.201593 + 6."""
    given = pairs(A)
    assert float(combine(["sigmoid", "nll"], [1.0, 1.0], given, beta(0.1))) == pytest.approx(2.403186, abs=1e-6)
    assert float(combine(["sigmoid", "nll"], [0.5, 3.0], given, beta(0.1))) == pytest.approx(6.201593, abs=1e-6)
    with pytest.raises(ValueError, match="zip"):
        combine(["sigmoid", "nll"], [1.0], given, beta(0.1))
