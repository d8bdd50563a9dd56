"""Metrics of hand-made batches against values worked out by hand."""

import pytest
import torch

from prefpipe.stages.train.losses.batch import Logps, PairBatch
from prefpipe.stages.train.losses.metrics import metrics
from tests.stages.train.cases import A, C, Row, labels, pairs, ranks


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
    every = {name: counted.tolist() for name, (_, counted) in metrics(pairs(A, tie, wrong), 0.1).items()}
    assert all(counted == [1.0] * 3 for name, counted in every.items() if "len_" not in name)


def test_where_the_policy_is_the_reference_what_noise_explains_is_a_tie():
    """A pair of 8 + 8 tokens: the standard deviation of h is 4 * 0.05 = 0.2 nats, four of them are 0.8."""
    rows: list[Row] = [(h - 3.0, -4.0, -3.0, -4.0, 8.0, 8.0) for h in (0.79, -0.79, 0.81, -0.81, 0.0)]
    batch = pairs(*rows)
    shown = metrics(batch, 0.1, noise=0.05)
    assert shown["rewards/accuracies"][0].tolist() == [0.5, 0.5, 1.0, 0.0, 0.5]
    assert metrics(batch, 0.1)["rewards/accuracies"][0].tolist() == [1.0, 0.0, 1.0, 0.0, 0.5]
    others = metrics(batch, 0.1)
    assert all(torch.equal(shown[n][0], others[n][0]) for n in others if n != "rewards/accuracies")
    nearly: list[Row] = [(h - 3.0, -4.0, -3.0, -4.0, 8.0, 8.0) for h in (1e-4, -1e-4, 1e-3)]
    assert metrics(pairs(*nearly), 0.1, noise=0.0)["rewards/accuracies"][0].tolist() == [0.5, 0.5, 1.0]


def test_margins_by_length_count_the_pairs_of_a_bucket():
    """Both completions together: 45 (A) and 64 tokens in the first, 65 and 256 in the second, none, 1700 (C)."""
    rows = [A, *((-1.0, -1.0, -2.0, -1.0, 40.0, length) for length in (24.0, 25.0, 216.0)), C]
    found = metrics(pairs(*rows), 0.1)
    counted = {name: c.tolist() for name, (_, c) in found.items() if name.startswith("rewards/margins/")}
    assert counted == {
        "rewards/margins/len_0_64": [1, 1, 0, 0, 0],
        "rewards/margins/len_64_256": [0, 0, 1, 1, 0],
        "rewards/margins/len_256_1024": [0, 0, 0, 0, 0],
        "rewards/margins/len_1024_inf": [0, 0, 0, 0, 1],
    }
    assert all(torch.equal(found[name][0], found["rewards/margins"][0]) for name in counted)


def test_metrics_without_reference_hold_log_probs_only_and_no_graph():
    logps = Logps(torch.tensor([-1.0], requires_grad=True), torch.ones(1))
    found = metrics(PairBatch(logps, logps), 0.1)
    assert set(found) == {
        "logps/chosen", "logps/rejected", "logps/accuracies", "lengths/chosen", "lengths/rejected"
    }  # fmt: skip
    assert not any(values.requires_grad for values, _ in found.values())


def test_metrics_that_alerts_are_made_of():
    """A: a = 2 nats over 20 tokens, b = -5 over 25. At beta 0.1 its gradient weight is s(-0.7). `fallen`: both sides
    lost, and s(-beta h) with h = 60 is s(-6) = 0.00247, below 0.01."""
    fallen: Row = (-50.0, -110.0, -45.0, -45.0, 10.0, 50.0)
    found = {name: values.tolist() for name, (values, _) in metrics(pairs(A, fallen), 0.1, on_reference=True).items()}
    assert found["deltas/chosen"] == pytest.approx([0.1, -0.5])
    assert found["deltas/rejected"] == pytest.approx([-0.2, -1.3])
    assert found["lengths/chosen"] == [20.0, 10.0]
    assert found["lengths/rejected"] == [25.0, 50.0]
    assert found["rewards/gradient_weights"] == pytest.approx([0.331812, 0.002473], abs=1e-6)
    assert found["rewards/saturated"] == [0.0, 1.0]
    assert found["rewards/both_fall"] == [0.0, 1.0]
    assert found["rewards/abs_margins"] == pytest.approx([0.7, 6.0])
    assert found["logps/accuracies"] == [1.0, 1.0]
    assert found["kl/ref_policy"] == pytest.approx([1.5, 35.0])  # -(2 - 5) / 2 and (5 + 65) / 2
    assert found["kl/ref_policy_per_token"] == pytest.approx([0.05, 0.9])


def test_the_raw_accuracy_ignores_the_reference():
    """chosen above rejected by 1 nat, but 2 nats less so than under the reference."""
    row: Row = (-3.0, -4.0, -3.0, -6.0, 1.0, 1.0)
    found = {name: values.tolist() for name, (values, _) in metrics(pairs(row), 0.1).items()}
    assert (found["logps/accuracies"], found["rewards/accuracies"]) == ([1.0], [0.0])


def test_no_divergence_is_read_off_rows_that_the_reference_did_not_sample():
    assert not any(name.startswith("kl/") for name in metrics(pairs(A), 0.1))


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
