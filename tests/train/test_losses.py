"""Losses: values derived by hand, invariances, gradients against finite differences, extremes, a NumPy oracle."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.train.losses import LOSSES, LossBatch, combine, log_ratios, metrics, nll, sigmoid

LN2 = math.log(2)
LOGP = st.floats(-2000, 0, width=32)
ROW = st.tuples(LOGP, LOGP, LOGP, LOGP, st.integers(1, 1000), st.integers(1, 1000))
ROWS = st.lists(ROW, min_size=1, max_size=6)
BETA = st.floats(0.01, 10)


def batch(*rows: tuple[float, ...], dtype: torch.dtype = torch.float64) -> LossBatch:
    """Rows are (chosen, rejected, ref_chosen, ref_rejected, chosen length, rejected length)."""
    return LossBatch(*torch.tensor(rows, dtype=dtype).T)


def swapped(given: LossBatch) -> LossBatch:
    return LossBatch(
        given.rejected_logps, given.chosen_logps, given.ref_rejected_logps, given.ref_chosen_logps,
        given.rejected_lengths, given.chosen_lengths,
    )  # fmt: skip


A = (-40.0, -55.0, -42.0, -50.0, 20.0, 25.0)
C = (-2000.0, -1800.0, -1990.0, -1805.0, 900.0, 800.0)
D = (-0.5, -3.0, -0.7, -2.0, 1.0, 2.0)


@pytest.mark.parametrize(("row", "h"), [(A, 7.0), (C, -15.0), (D, 1.2)])
def test_dpo_values_derived_by_hand(row: tuple[float, ...], h: float):
    """h = (c - c0) - (r - r0): A 2 + 5 = 7, C -10 - 5 = -15, D 0.2 + 1 = 1.2; the loss is ln(1 + e^(-0.1 h))."""
    found = float(sigmoid(batch(row), 0.1))
    assert found == pytest.approx(math.log(1 + math.exp(-0.1 * h)), rel=1e-12)
    assert found == pytest.approx({7.0: 0.403186, -15.0: 1.701413, 1.2: 0.634946}[h], abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(LOGP, LOGP), min_size=1, max_size=5), BETA)
def test_dpo_of_the_reference_itself_is_ln_2(rows: list[tuple[float, float]], beta: float):
    """Policy = reference: h = 0 whatever the values and beta, and -log sigmoid(0) = ln 2."""
    found = sigmoid(batch(*((c, r, c, r, 1, 1) for c, r in rows)), beta)
    assert found.tolist() == [LN2] * len(rows)


@settings(deadline=None)
@given(ROWS, BETA)
def test_swapping_the_sides_adds_beta_h(rows: list[tuple[float, ...]], beta: float):
    """With x = beta h: -S(-x) + S(x) = log(s(x) / s(-x)) = log(e^x) = x, for S = log s and s the sigmoid."""
    given = batch(*rows)
    chosen, rejected = log_ratios(given)
    h = chosen - rejected
    difference = sigmoid(swapped(given), beta) - sigmoid(given, beta)
    torch.testing.assert_close(difference, beta * h, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(ROWS, BETA, st.floats(-500, 500, width=32))
def test_dpo_is_blind_to_a_shift_of_both_sides(rows: list[tuple[float, ...]], beta: float, shift: float):
    """The same k added to chosen and rejected leaves h as it is."""
    moved = batch(*((c + shift, r + shift, *rest) for c, r, *rest in rows))
    torch.testing.assert_close(sigmoid(moved, beta), sigmoid(batch(*rows), beta), rtol=1e-9, atol=1e-9)


def gradient(name: str, given: LossBatch, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, rejected = (t.detach().clone().requires_grad_() for t in (given.chosen_logps, given.rejected_logps))
    own = LossBatch(
        chosen, rejected, given.ref_chosen_logps, given.ref_rejected_logps, given.chosen_lengths, given.rejected_lengths
    )
    LOSSES[name].fn(own, beta).sum().backward()
    return chosen.grad, torch.zeros_like(rejected) if rejected.grad is None else rejected.grad


@pytest.mark.parametrize("row", [A, C, D])
def test_dpo_gradient_is_minus_beta_sigmoid_of_minus_beta_h(row: tuple[float, ...]):
    """d/dc -S(beta h) = -beta s(-beta h) < 0 and the opposite for r: chosen goes up, rejected down, equally."""
    chosen, rejected = gradient("sigmoid", batch(row), 0.1)
    h = (row[0] - row[2]) - (row[1] - row[3])
    assert float(chosen) == pytest.approx(-0.1 / (1 + math.exp(0.1 * h)), rel=1e-12)
    assert float(rejected) == -float(chosen)


def test_nll_gradient_is_minus_one_over_length_and_ignores_rejected():
    chosen, rejected = gradient("nll", batch(A, D), 0.1)
    assert chosen.tolist() == [-1 / 20, -1.0]
    assert rejected.tolist() == [0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.floats(-30, 0)] * 4), st.floats(0.05, 1), st.sampled_from(sorted(LOSSES)))
def test_gradients_equal_finite_differences(row: tuple[float, ...], beta: float, name: str):
    """Central differences in float64: error O(step^2), below 1e-6 relative."""
    step = 1e-4
    given = (*row, 7.0, 9.0)
    found = [float(g) for g in gradient(name, batch(given), beta)]
    for position, value in enumerate(found):
        up, down = list(given), list(given)
        up[position] += step
        down[position] -= step
        values = [float(LOSSES[name].fn(batch(tuple(r)), beta)) for r in (up, down)]
        expected = (values[0] - values[1]) / (2 * step)
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("beta", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize("h", [-1e4, -200.0, 0.0, 200.0, 1e4])
def test_extremes_stay_finite_in_float32(h: float, beta: float):
    """Log-probs of -2000 with |beta h| up to 1e5: the loss tends to max(0, -beta h), its slope to 0 or -beta."""
    row = (-2000.0, -2000.0 - h, -2000.0, -2000.0, 500.0, 500.0)
    given = batch(row, dtype=torch.float32)
    loss, (chosen, rejected) = float(sigmoid(given, beta)), gradient("sigmoid", given, beta)
    assert loss == pytest.approx(float(np.logaddexp(0, -beta * h)), rel=1e-5, abs=1e-30)
    assert torch.isfinite(chosen).all()
    assert torch.isfinite(rejected).all()
    if beta * h <= -200:
        assert float(chosen) == pytest.approx(-beta)


def test_nll_is_the_mean_over_tokens():
    """A: 40 nats over 20 tokens = 2; D: 0.5 over 1; rejected and reference take no part."""
    assert nll(batch(A, D), 0.1).tolist() == [2.0, 0.5]
    assert not LOSSES["nll"].needs_reference
    assert LOSSES["sigmoid"].needs_reference


def test_combine_adds_weighted_losses():
    """DPO + NLL of A at beta 0.1: 0.403186 + 2 = 2.403186; with weights 0.5 and 3: 0.201593 + 6."""
    given = batch(A)
    assert float(combine(["sigmoid", "nll"], [1.0, 1.0], given, 0.1)) == pytest.approx(2.403186, abs=1e-6)
    assert float(combine(["sigmoid", "nll"], [0.5, 3.0], given, 0.1)) == pytest.approx(6.201593, abs=1e-6)
    with pytest.raises(ValueError, match="zip"):
        combine(["sigmoid", "nll"], [1.0], given, 0.1)


def test_metrics_and_ties():
    """Implicit rewards are beta (logp - ref): A at 0.1 gives 0.2 and -0.5, margin 0.7. A tie is right half the time."""
    tie = (-3.0, -4.0, -3.0, -4.0, 1.0, 1.0)
    wrong = (-5.0, -4.0, -3.0, -4.0, 1.0, 1.0)
    found = metrics(batch(A, tie, wrong), 0.1)
    assert found["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0]
    assert found["rewards/chosen"].tolist() == pytest.approx([0.2, 0.0, -0.2])
    assert found["rewards/rejected"].tolist() == pytest.approx([-0.5, 0.0, 0.0])
    assert found["rewards/margins"].tolist() == pytest.approx([0.7, 0.0, -0.2])
    assert found["logps/chosen"].tolist() == [-40.0, -3.0, -5.0]
    assert found["logps/rejected"].tolist() == [-55.0, -4.0, -4.0]


def test_metrics_without_reference_hold_log_probs_only_and_no_graph():
    logps = torch.tensor([-1.0], requires_grad=True)
    found = metrics(LossBatch(logps, logps, None, None, torch.ones(1), torch.ones(1)), 0.1)
    assert set(found) == {"logps/chosen", "logps/rejected"}
    assert not any(v.requires_grad for v in found.values())


@pytest.mark.parametrize("missing", ["both", "chosen", "rejected"])
def test_a_loss_that_needs_the_reference_says_so(missing: str):
    one = torch.ones(1)
    given = LossBatch(one, one, one if missing == "rejected" else None, one if missing == "chosen" else None, one, one)
    with pytest.raises(ValueError, match="reference"):
        sigmoid(given, 0.1)
    assert nll(given, 0.1).tolist() == [-1.0]


@pytest.mark.parametrize("shape", [(2,), (1, 1), ()])
def test_a_batch_of_other_shapes_is_refused(shape: tuple[int, ...]):
    """A [B] beside a [B, 1] would broadcast to [B, B] without a word."""
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"\[B\]"):
        LossBatch(one, one, torch.ones(shape), one, one, one)
    if shape != (2,):
        with pytest.raises(ValueError, match=r"\[B\]"):
            LossBatch(*[torch.ones(shape)] * 6)


def numpy_dpo(rows: np.ndarray, beta: float) -> np.ndarray:
    chosen, rejected, ref_chosen, ref_rejected, _, _ = rows.T
    return np.logaddexp(0, -beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def numpy_nll(rows: np.ndarray, beta: float) -> np.ndarray:
    return -rows[:, 0] / rows[:, 4]


@settings(deadline=None)
@given(ROWS, BETA)
def test_parity_with_numpy(rows: list[tuple[float, ...]], beta: float):
    for name, oracle in (("sigmoid", numpy_dpo), ("nll", numpy_nll)):
        expected = oracle(np.array(rows, dtype=np.float64), beta)
        found = LOSSES[name].fn(batch(*rows), beta).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        single = LOSSES[name].fn(batch(*rows, dtype=torch.float32), beta).numpy()
        np.testing.assert_allclose(single, expected, rtol=1e-4, atol=5e-3)  # |x| to 4e4: fp32 keeps 2e-3 of it
