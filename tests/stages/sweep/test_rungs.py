"""Halving: rungs are evaluations that a run makes anyway, and the better half goes on."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefpipe.errors import UsageError
from prefpipe.stages.sweep import rungs


def test_a_rung_is_the_next_evaluation() -> None:
    assert rungs.pauses([0.25, 0.5], num_steps=100, eval_steps=10) == [30, 50]
    assert rungs.pauses([0.5], num_steps=7, eval_steps=5) == [5]
    assert rungs.pauses([0.9], num_steps=7, eval_steps=5) == [7]


@given(st.floats(0.01, 0.99), st.integers(2, 500), st.integers(1, 60))
def test_a_rung_is_not_before_its_share(share: float, num_steps: int, eval_steps: int) -> None:
    (step,) = rungs.pauses([share], num_steps, eval_steps)
    assert share * num_steps <= step <= num_steps
    assert step % eval_steps == 0 or step == num_steps
    assert step - eval_steps < share * num_steps


@pytest.mark.parametrize(("shares", "eval_steps"), [([0.5], 50), ([0.25, 0.3], 10), ([0.95], 10)])
def test_rungs_that_fall_together_are_refused(shares: list[float], eval_steps: int) -> None:
    with pytest.raises(UsageError, match="compares after steps"):
        rungs.check(shares, 20, eval_steps)
    rungs.check([0.25, 0.5], 20, 1)


def test_the_better_half_goes_on() -> None:
    """Rounded up, in the order in which they stood, the earlier of equal ones; one without a value never."""
    assert rungs.better_half({"a": 1.0, "b": 3.0, "c": 2.0}) == ["b", "c"]
    assert rungs.better_half({"a": 1.0, "b": 1.0}) == ["a"]
    assert rungs.better_half({"a": None, "b": math.nan, "c": -5.0, "d": 0.0}) == ["c", "d"]
    assert rungs.better_half({"a": None}) == []
    assert rungs.better_half({"a": 0.0}) == ["a"]
