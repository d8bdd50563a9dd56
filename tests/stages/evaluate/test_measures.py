"""Sums by hand, and what counts as a degenerate answer."""

import math

import pytest

from prefpipe.schemas import Evaluation
from prefpipe.stages.evaluate.measures import is_degenerate, mean_reward, measure, summarize
from prefpipe.stages.evaluate.statistics import bootstrap, wilson
from tests.stages.evaluate.cases import LONG, estimates_hold, row


def totals(rows: list[Evaluation], pass_reward: float) -> dict[str, dict[str, float]]:
    return summarize(measure(rows), pass_reward)


@pytest.mark.parametrize(
    ("text", "finish_reason", "degenerate"),
    [
        (LONG, "stop", False),
        (LONG, "length", True),
        ("two words", "stop", True),
        ("three whole words", "stop", False),
        ("", "stop", True),
        ("a b c a b c a b c", "stop", True),  # 'a b c' three times
        ("a b c a b c a b", "stop", False),  # twice
        ("no no no no no", "stop", True),  # 'no no no' starts at three places
        ("no no no no", "stop", False),  # at two
    ],
)
def test_degenerate_answers(text: str, finish_reason: str, degenerate: bool) -> None:
    assert is_degenerate(text, finish_reason) == degenerate


def test_sums_by_hand() -> None:
    """Two prompts. Greedy: rewards 1 and 0.5, so 1 of 2 pass. Sampled: 1, null, 0.9, 1 - two of four pass.

    The mean reward leaves the null out: 2.9 / 3. Words: greedy 5 and 3, mean 4; the cut answer is degenerate. Pass@2 of
    two samples is 1 where one of them passes: both prompts.
    """
    rows = [
        row("p", "greedy", 1.0), row("q", "greedy", 0.5, "three whole words", "length"),
        row("p", "sampled", 1.0, "one two three four"), row("p", "sampled", None, "one two three five"),
        row("q", "sampled", 0.9, "one two three six"), row("q", "sampled", 1.0, "I cannot say that"),
    ]  # fmt: skip
    found = totals(rows, 1.0)
    assert found["prompts"] == 2
    greedy, sampled = found["greedy"], found["sampled"]
    low, high = wilson([True, False])
    expected = {
        "answers": 2, "pass": 0.5, "low": low, "high": high, "mean_reward": 0.75, "mean_words": 4.0, "mean_tokens": 1.0,
        "degenerate": 0.5, "truncated": 0.5, "truncated_low": low, "refusals": 0.0, "repetition": 0.0, "thinking": 0.0,
        "distinct_1": 1.0,
    }  # fmt: skip
    assert {name: greedy[name] for name in expected} == pytest.approx(expected)
    assert not [name for name in greedy if name.startswith("pass_at")]
    low, high = bootstrap([[True, False], [False, True]])
    expected = {
        "answers": 4, "pass": 0.5, "low": low, "high": high, "mean_reward": 2.9 / 3, "mean_words": 4.0,
        "degenerate": 0.0, "refusals": 0.25, "pass_at_1": 0.5, "pass_at_2": 1.0, "pass_at_2_low": wilson([True] * 2)[0],
        "distinct_1": 13 / 16, "distinct_2": 10 / 12,
    }  # fmt: skip
    assert {name: sampled[name] for name in expected} == pytest.approx(expected)
    assert totals(rows, 0.5)["greedy"]["pass"] == 1.0
    assert estimates_hold(found) == []


def test_repetition_and_reasoning_are_shares() -> None:
    """'a b c d' twice: 5 4-grams, 4 distinct. Reasoning of 6 characters in front of an answer of 18."""
    looping = row("p", "greedy", 1.0, "a b c d a b c d")
    thinking = row("q", "greedy", 1.0, "eighteen letters..")
    object.__setattr__(thinking, "thinking", "<t>a</")
    found = totals([looping, thinking], 1.0)["greedy"]
    assert found["repetition"] == pytest.approx((1 / 5 + 0) / 2)
    assert found["thinking"] == pytest.approx(6 / (15 + 24))


def test_all_rewards_null_pass_nothing() -> None:
    found = totals([row("p", "greedy", None), row("p", "sampled", None)], 0.0)
    assert (found["greedy"]["pass"], found["greedy"]["mean_reward"]) == (0.0, 0.0)
    assert mean_reward([[None], [2.0, None]]).value == 2.0


def test_one_text_for_several_prompts_is_degenerate() -> None:
    """The same words for three prompts: a policy that stopped reading. Two may be chance."""

    def share(*prompts: str) -> float:
        others = [row(f"other {n}", "greedy", 1.0, f"another {n} good answer") for n in range(4)]
        rows = [row(p, "greedy", 1.0) for p in prompts] + others
        return totals([*rows, row("p", "sampled", 1.0)], 1.0)["greedy"]["degenerate"] * len(rows)

    assert share("p", "q", "r") == pytest.approx(3)
    assert share("p", "q") == pytest.approx(0)


def test_one_answer_repeated_to_its_own_prompt_is_not_degenerate() -> None:
    """A confident policy gives the same good answer in every draw; that is not "one text given to several prompts"."""
    rows = [row("p", "greedy", 1.0), *(row("p", "sampled", 1.0) for _ in range(4))]
    found = totals(rows, 1.0)["sampled"]
    assert found["degenerate"] == 0.0
    assert found["distinct_1"] == pytest.approx(5 / 20)  # but its samples say one thing


def test_pass_at_k_goes_by_powers_of_two_up_to_the_samples() -> None:
    rows = [row("p", "sampled", float(i == 0)) for i in range(6)]
    found = totals(rows, 1.0)["sampled"]
    assert [name for name in found if name.startswith("pass_at") and name[-1].isdigit()] == [
        *("pass_at_1", "pass_at_2", "pass_at_4", "pass_at_6")
    ]
    assert [found[f"pass_at_{k}"] for k in (1, 2, 4, 6)] == pytest.approx([1 / 6, 1 - 10 / 15, 1 - 5 / 15, 1])
    assert all(map(math.isfinite, found.values()))
