"""Sums of rewards by name: what they mean, and where the error is in those that mean nothing."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefpipe.config.reward_sum import RewardSum, parse
from prefpipe.errors import UsageError

KNOWN = ("helpful", "math", "b-2", "mine.mod:f", "2x")


@pytest.mark.parametrize(
    ("text", "weights", "constant"),
    [
        ("math", {"math": 1.0}, 0.0),
        (" b-2 ", {"b-2": 1.0}, 0.0),  # a name of the inputs is never a difference
        ("2x", {"2x": 1.0}, 0.0),
        ("0.7*helpful + 0.3*math", {"helpful": 0.7, "math": 0.3}, 0.0),
        ("math-helpful", {"math": 1.0, "helpful": -1.0}, 0.0),
        ("-helpful+2*math*.5 - 1e-1", {"helpful": -1.0, "math": 1.0}, -0.1),
        ('+ mine.mod:f*3 - 2*"b-2" + "2x"', {"mine.mod:f": 3.0, "b-2": -2.0, "2x": 1.0}, 0.0),
        ("math + 2*math + 1 + 2.5", {"math": 3.0}, 3.5),
    ],
)
def test_a_sum_is_read(text: str, weights: dict[str, float], constant: float) -> None:
    found = parse(text, KNOWN)
    assert found == RewardSum(weights, constant)
    assert list(found.weights) == list(weights)
    assert found.is_plain == (list(weights.values()) == [1.0] and constant == 0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no reward given"),
        ("  ", "no reward given"),
        ("helpfull", "the inputs hold no reward 'helpfull' (did you mean 'helpful'?)"),
        ("math + 0.1*mth", "the inputs hold no reward 'mth' (did you mean 'math'?)"),
        ("0.5*b-2 + math", "the inputs hold no reward 'b' (did you mean 'b-2'?)"),
        ("helpful math", "character 9 ('math'): expected + or - or *"),
        ("helpful ++ math", "character 10 ('+'): expected a reward or a number"),
        ("  helpful +  ", "character 12 (the end): expected a reward or a number"),
        ("helpful*math", "character 9 ('math'): helpful and math are multiplied"),
        ("(math)", "character 1 ('('): expected a reward"),
        ("math / 2", "character 6 ('/'): expected + or - or *"),
        ("3*2x", "character 4 ('x'): expected + or - or *"),
        ('"math', "character 1 ('\"'): expected a reward"),
        ("3", "character 2 (the end): a sum needs a reward"),
        ("math + 1e999", "numbers up to 1e+30"),
        ("0*math + helpful", "math has the weight 0"),
        ("math + helpful - math", "math has the weight 0"),
        ("1e999*math", "math has the weight inf"),
        ("1e200*math", "math has the weight 1e+200"),
        ("math + 1e31", "numbers up to 1e+30"),
    ],
)
def test_what_is_no_sum_is_refused_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, KNOWN)
    assert problem in caught.value.message
    assert caught.value.exit_code == 2


def test_the_hint_lists_the_rewards() -> None:
    for text in ("", "other"):
        with pytest.raises(UsageError) as caught:
            parse(text, KNOWN)
        assert "the inputs hold helpful, math, b-2, mine.mod:f, 2x" in caught.value.hint
    with pytest.raises(UsageError, match="no reward given") as caught:
        parse("", ())
    assert "the inputs hold none" in caught.value.hint


@given(st.dictionaries(st.sampled_from(KNOWN), st.floats(-9, 9).filter(bool), min_size=1), st.floats(-9, 9))
def test_any_sum_that_is_written_out_is_read_back(weights: dict[str, float], constant: float) -> None:
    terms = [f'{"-" if w < 0 else "+"} {abs(w)!r} * "{name}"' for name, w in weights.items()]
    found = parse(" ".join(terms) + f" {'-' if constant < 0 else '+'} {abs(constant)!r}", KNOWN)
    assert (dict(found.weights), found.constant) == (weights, constant)


@given(st.text(alphabet='ab+-*."( 1e9', max_size=12))
def test_any_text_is_a_sum_or_an_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse(text, ("a", "ab")).weights.keys() <= {"a", "ab"}
