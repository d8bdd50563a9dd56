"""The claims of docs/snippets.md that are marked there: what the usual fragments compute, run beside the right form."""

import math

import pytest
import torch

from prefpipe.stages.train.losses.batch import LabelBatch, Logps
from prefpipe.stages.train.losses.pairwise import log_odds
from prefpipe.stages.train.losses.unpaired import kto
from tests.stages.train.cases import beta, labels


def test_bfloat16_cannot_tell_long_answers_apart():
    assert torch.tensor(-2007.4).bfloat16() == torch.tensor(-2004.1).bfloat16()


@pytest.mark.parametrize(("training", "graph"), [(True, True), (False, False)])
def test_the_switch_of_gradients_does_the_opposite_of_what_is_meant(training: bool, graph: bool):
    """A reference in train mode gets a graph inside the outer no_grad; a policy in eval mode gets none."""
    model = torch.nn.Linear(2, 1).train(training)

    def logps() -> torch.Tensor:
        with torch.no_grad() if not model.training else torch.enable_grad():
            return model(torch.ones(2))

    with torch.no_grad():
        assert logps().requires_grad == graph
    assert logps().requires_grad == graph


def test_the_logarithm_of_a_sigmoid_is_not_log_sigmoid():
    x = torch.tensor(-200.0, requires_grad=True)
    naive = x.sigmoid().log()
    naive.backward()
    assert math.isinf(float(naive.detach()))
    assert math.isnan(float(x.grad))
    y = torch.tensor(-200.0, requires_grad=True)
    stable = torch.nn.functional.logsigmoid(y)
    stable.backward()
    assert (float(stable.detach()), float(y.grad)) == (-200.0, 1.0)


def usual_kto(desirable: torch.Tensor, undesirable: torch.Tensor, b: float) -> torch.Tensor:
    """The fragment: rewards times beta, z0 from the rows themselves in nats, class means added up."""
    z0 = (desirable.mean() + undesirable.mean()) / 2
    return (1 - torch.sigmoid(b * desirable - z0)).mean() + (1 - torch.sigmoid(z0 - b * undesirable)).mean()


def test_the_worked_example_of_kto():
    good, bad = torch.tensor([6.0, 4.0]), torch.tensor([-3.0, 1.0])
    assert float(usual_kto(good, bad, 0.1)) == pytest.approx(0.928, abs=1e-3)
    rows = labels((6.0, 0.0, True), (4.0, 0.0, True), (-3.0, 0.0, False), (1.0, 0.0, False), z0=1.2)
    assert float(kto(rows, beta(0.1)).mean()) == pytest.approx(0.426, abs=1e-3)


def test_a_batch_of_one_class_breaks_the_fragment_only():
    assert math.isnan(float(usual_kto(torch.tensor([6.0, 4.0]), torch.zeros(0), 0.1)))
    assert math.isfinite(float(kto(labels((6.0, 0.0, True), z0=1.2), beta(0.1)).mean()))


def test_a_reference_point_of_matched_rows_is_no_anchor():
    """All log-ratios shifted by k: with z0 = mean of the same rows nothing changes; KTO's own z0 stays where it was."""
    x, desirable = torch.tensor([2.0, -1.0, 0.5, 1.0]), torch.tensor([True, False, True, False])

    def loss(shift: float, z0: float) -> float:
        rows = LabelBatch(Logps(x + shift, torch.ones(4), torch.zeros(4)), desirable, torch.tensor(z0))
        return float(kto(rows, beta(0.1)).mean())

    matched = [loss(k, float((x + k).mean())) for k in (0.0, 50.0)]
    assert matched[0] == pytest.approx(matched[1], rel=1e-5)
    x, desirable = x[:3], desirable[:3]  # more good than bad rows: a shift is worth something to them
    desirable = torch.tensor([True, False, True])
    kept = []
    for k in (0.0, 50.0):
        rows = LabelBatch(Logps(x + k, torch.ones(3), torch.zeros(3)), desirable, torch.tensor(0.6))
        kept.append(float(kto(rows, beta(0.1)).mean()))
    assert kept[1] < kept[0] - 0.05


def test_odds_of_summed_log_probs_are_the_log_probs():
    """At -40 nats P is 4e-18: log odds differ from log P by nothing that float32 can hold."""
    assert float(log_odds(torch.tensor(-40.0))) == -40.0
    assert float(log_odds(torch.tensor(-0.5))) == pytest.approx(-0.5 - math.log(1 - math.exp(-0.5)), rel=1e-6)


def test_the_clamp_below_one_rounds_to_one_in_bfloat16():
    p = torch.tensor(1.0, dtype=torch.bfloat16).clamp(max=1 - 1e-6)
    assert float(torch.log1p(-p)) == -math.inf
    assert math.isnan(float(torch.log1p(-p) - torch.log1p(-p)))


def test_both_branches_of_where_have_a_gradient():
    """log(1 - exp(x)) by cases is right at x = 0 minus, and its gradient is NaN there unless x is clamped first."""
    x = torch.tensor(0.0, requires_grad=True)
    torch.where(x > -0.7, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x))).backward()
    assert not math.isfinite(float(x.grad))
    y = torch.tensor(0.0, requires_grad=True)
    log_odds(y).backward()
    assert math.isfinite(float(y.grad))
