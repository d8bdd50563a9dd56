"""KTO: values by hand and golden, its reference point, its labels, gradients, and what the usual snippet gets wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.stages.train.losses.unpaired import apo_zero_unpaired, kto, reference_point
from tests.stages.train.cases import A, B, C, D, Row, beta, labels

X = st.floats(-300, 300, width=32)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (A, (0.475021, 0.354344)), (B, (0.598688, 0.24974)), (C, (0.75026, 0.598688)), (D, (0.519989, 0.450166)),
    ],
)  # fmt: skip
def test_golden_values(row: Row, expected: tuple[float, float]):
    """The chosen side as desirable, the rejected one as undesirable, z0 = 1, beta 0.1; six decimals."""
    c, r, c0, r0, *_ = row
    found = kto(labels((c, c0, True), (r, r0, False), z0=1.0), beta(0.1))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_values_by_hand():
    """Log-ratios 6, 4 desirable, -3, 1 undesirable, z0 1.2, beta 0.1: s(-0.48), s(-0.28), s(-0.42), s(-0.02)."""
    rows = [(6.0, 0.0, True), (4.0, 0.0, True), (-3.0, 0.0, False), (1.0, 0.0, False)]
    found = kto(labels(*rows, z0=1.2), beta(0.1))
    expected = [1 / (1 + math.exp(x)) for x in (0.48, 0.28, 0.42, 0.02)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert float(found.mean()) == pytest.approx(0.4261, abs=1e-4)


@settings(deadline=None, max_examples=50)
@given(X, X, st.booleans(), st.floats(0.1, 5), st.floats(0.1, 5))
def test_weights_are_inside_and_the_reference_gives_half_of_them(
    c: float, z: float, label: bool, up: float, down: float
):
    """lambda - v with v = lambda s(..): at x = z0 it is lambda / 2, whatever beta."""
    found = float(
        kto(labels((c, c - abs(z), label), z0=abs(z)), beta(0.1, desirable_weight=up, undesirable_weight=down))
    )
    assert found == pytest.approx((up if label else down) / 2, rel=1e-9)


def test_with_z0_at_0_it_is_apo_zero_without_pairs():
    rows = labels((-4.0, -6.0, True), (-7.0, -2.0, False))
    assert kto(rows, beta(0.1)).tolist() == apo_zero_unpaired(rows, beta(0.1)).tolist()
    assert kto(labels((-4.0, -6.0, True), z0=3.0), beta(0.1)).tolist() != kto(rows, beta(0.1)).tolist()[:1]


def test_a_shift_of_all_log_ratios_is_seen():
    """z0 comes from mismatched rows: it does not move with the rows themselves, so the loss keeps its anchor."""
    here, there = (float(kto(labels((k, 0.0, True), (k, 0.0, False), z0=1.0), beta(0.1))[0]) for k in (0.0, 5.0))
    assert there < here - 0.05


@pytest.mark.parametrize(("total", "rows", "expected"), [(8.0, 4, 2.0), (-8.0, 4, 0.0), (0.0, 16, 0.0)])
def test_the_reference_point_is_a_mean_that_is_never_negative(total: float, rows: int, expected: float):
    assert reference_point(total, rows) == expected


@pytest.mark.parametrize("desirable", [True, False])
def test_a_batch_of_one_class_is_finite(desirable: bool):
    rows = [(-4.0 - i, -5.0, desirable) for i in range(3)]
    assert torch.isfinite(kto(labels(*rows, z0=0.4), beta(0.1))).all()


@settings(deadline=None, max_examples=60)
@given(st.floats(-30, 30), st.floats(0, 10), st.booleans(), st.floats(0.02, 1))
def test_gradients_equal_finite_differences_and_point_the_right_way(x: float, z0: float, label: bool, b: float):
    leaf = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    given = labels((x, 0.0, label), z0=z0)
    object.__setattr__(given.completion, "policy_logps", leaf)
    kto(given, beta(b)).sum().backward()
    step = 1e-4
    up, down = (float(kto(labels((x + d, 0.0, label), z0=z0), beta(b))) for d in (step, -step))
    assert float(leaf.grad) == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-9)
    assert (float(leaf.grad) < 0) == label


@pytest.mark.parametrize("x", [-1e4, -200.0, 200.0, 1e4])
def test_extremes_are_exact_in_float32(x: float):
    """1 - s(y) is computed as s(-y): at y = 20 it keeps 2e-9, where the difference would be 0."""
    one = labels((x, 0.0, True), (x, 0.0, False), dtype=torch.float32)
    assert torch.isfinite(kto(one, beta(1.0))).all()
    tail = float(kto(labels((20.0, 0.0, True), dtype=torch.float32), beta(1.0)))
    assert tail == pytest.approx(math.exp(-20.0), rel=1e-4)
