"""Stand-ins on the side of the tests: what they ask of the program, and with which values."""

import contextlib
import operator
from typing import Any

import pytest

from prefpipe.rewards.sandbox.remote import Remote


class Program:
    """The other end: says yes to everything, and remembers what it saw."""

    guarded = True

    def __init__(self, held: Any = None) -> None:
        self.held, self.seen = held, list[Any]()

    def ask(self, what: str, *arguments: Any) -> Any:
        self.seen += arguments[1:] if what != "sub" else ()
        if what == "plain":
            if self.held is None:
                raise TypeError
            return self.held
        return Remote(self, 2) if what == "sub" else 1


@pytest.mark.parametrize(
    "compare", [operator.eq, operator.lt, operator.ge, lambda a, b: {b: 1} == {b: a}, lambda a, b: b == a]
)
def test_a_comparison_with_data_shows_nothing_and_believes_nothing(compare: Any) -> None:
    program = Program()
    with contextlib.suppress(TypeError):
        assert not compare(Remote(program, 1), 3)
    assert program.seen == []
    assert compare(Remote(Program("7"), 1), "3") is (compare is operator.ge), "what it holds is compared here"


def test_what_a_difference_to_a_value_of_the_tests_is_worth_is_refused() -> None:
    difference = Remote(Program(), 1) - 3
    assert isinstance(difference, Remote)
    for function in (abs, float, int, round, bool, len, iter):
        with pytest.raises(TypeError):
            function(difference)
    assert not difference == 0  # noqa: SIM201
    with pytest.raises(TypeError):
        assert difference < 1
    assert Remote(Program(5), 1) - 3 == 2
