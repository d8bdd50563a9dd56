"""Plackett-Luce over ranked groups: values by hand, DPO for two, padding, and a slow plain oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.stages.train.losses import pairwise
from prefpipe.stages.train.losses.listwise import plackett_luce
from tests.stages.train.cases import beta, pairs, ranks

GROUP = st.lists(st.floats(-200, 200, width=32), min_size=2, max_size=6)


def plain(group: list[float], b: float) -> float:
    """The negative log-probability of drawing the completions in this order without replacement."""
    total = 0.0
    for k in range(len(group) - 1):
        rest = [b * a for a in group[k:]]
        top = max(rest)
        total -= rest[0] - top - math.log(sum(math.exp(x - top) for x in rest))
    return total


@settings(deadline=None, max_examples=60)
@given(st.lists(GROUP, min_size=1, max_size=4), st.floats(0.01, 2))
def test_equals_the_plain_sum_for_groups_of_any_size_together(groups: list[list[float]], b: float):
    found = plackett_luce(ranks(*groups), beta(b))
    assert found.tolist() == pytest.approx([plain(group, b) for group in groups], rel=1e-9, abs=1e-9)
    single = plackett_luce(ranks(*groups, dtype=torch.float32), beta(b))
    assert single.tolist() == pytest.approx([plain(group, b) for group in groups], rel=1e-4, abs=1e-3)


def test_three_equal_completions_have_six_orders():
    assert float(plackett_luce(ranks([1.0, 1.0, 1.0]), beta(0.3))) == pytest.approx(math.log(6))


@settings(deadline=None, max_examples=30)
@given(st.floats(-100, 0), st.floats(-100, 0), st.floats(0.01, 2))
def test_two_completions_are_a_dpo_pair(a: float, b: float, value: float):
    two = plackett_luce(ranks([a, b]), beta(value))
    torch.testing.assert_close(two, pairwise.sigmoid(pairs((a, b, 0.0, 0.0, 1, 1)), beta(value)), rtol=1e-9, atol=1e-9)


def test_gradients_equal_finite_differences_beside_padding():
    """A group of three beside one of five: gradients of padding are 0, those of completions sum to 0."""
    groups = [[0.5, -1.0, 2.0], [1.0, 3.0, -2.0, 0.1, 0.2]]
    given = ranks(*groups)
    leaf = given.completions.policy_logps.clone().requires_grad_()
    object.__setattr__(given.completions, "policy_logps", leaf)
    plackett_luce(given, beta(0.7)).sum().backward()
    found = leaf.grad
    assert torch.isfinite(found).all()
    assert found[0, 3:].tolist() == [0.0, 0.0]
    assert found.sum(-1).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    step = 1e-5
    for row, own in enumerate(groups):
        for place in range(len(own)):
            up, down = ([*own[:place], own[place] + d, *own[place + 1 :]] for d in (step, -step))
            expected = (plain(up, 0.7) - plain(down, 0.7)) / (2 * step)
            assert float(found[row, place]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
