"""The registry, the weighted sum, and what is reported beside it."""

from dataclasses import fields

import pytest
import torch

from prefpipe.config.train import PAIR_LOSSES, READS, ROWS
from prefpipe.train.lossbatch import Logps, LossSettings, PairBatch
from prefpipe.train.losses import LOSSES, combine, metrics
from tests.train.cases import A, Row, beta, labels, pairs, ranks
from tests.train.test_pairwise import Recorder


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


def test_metrics_of_pairs_and_ties():
    """Implicit rewards are beta (logp - ref): A at 0.1 gives 0.2 and -0.5, margin 0.7. A tie is right half the time."""
    tie: Row = (-3.0, -4.0, -3.0, -4.0, 1.0, 1.0)
    wrong: Row = (-5.0, -4.0, -3.0, -4.0, 1.0, 1.0)
    found = {name: values.tolist() for name, (values, _) in metrics(pairs(A, tie, wrong), 0.1).items()}
    assert found["rewards/accuracies"] == [1.0, 0.5, 0.0]
    assert found["rewards/chosen"] == pytest.approx([0.2, 0.0, -0.2])
    assert found["rewards/rejected"] == pytest.approx([-0.5, 0.0, 0.0])
    assert found["rewards/margins"] == pytest.approx([0.7, 0.0, -0.2])
    assert found["logps/chosen"] == [-40.0, -3.0, -5.0]
    assert found["logps/rejected"] == [-55.0, -4.0, -4.0]
    assert all(counted.tolist() == [1.0] * 3 for _, counted in metrics(pairs(A, tie, wrong), 0.1).values())


def test_metrics_without_reference_hold_log_probs_only_and_no_graph():
    logps = Logps(torch.tensor([-1.0], requires_grad=True), torch.ones(1))
    found = metrics(PairBatch(logps, logps), 0.1)
    assert set(found) == {"logps/chosen", "logps/rejected"}
    assert not any(values.requires_grad for values, _ in found.values())


def test_metrics_of_labels_count_each_class_alone():
    found = metrics(labels((-4.0, -6.0, True), (-7.0, -2.0, False), (-1.0, -1.5, True)), 0.1)
    rewards, counted = found["rewards/chosen"]
    assert (rewards * counted).tolist() == pytest.approx([0.2, 0.0, 0.05])
    assert counted.tolist() == [1.0, 0.0, 1.0]
    rewards, counted = found["rewards/rejected"]
    assert (rewards * counted).tolist() == pytest.approx([0.0, -0.5, 0.0])
    assert not any("kl" in name.lower() for name in found)  # z0 is no estimate of it


def test_metrics_of_groups_are_of_the_best_and_the_worst():
    """Padding (7 here) is never the worst."""
    found = {name: values.tolist() for name, (values, _) in metrics(ranks([3.0, 1.0, 2.0], [1.0, 4.0]), 0.5).items()}
    assert found["rewards/chosen"] == [1.5, 0.5]
    assert found["rewards/rejected"] == [1.0, 2.0]
    assert found["rewards/accuracies"] == [1.0, 0.0]
