"""Mathematical answers: right, wrong, unparsable, without an end, and the difference to a crash."""

import threading

import pytest

from prefpipe.config.rewards import Math
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.rewards.math_answers import check, inputs, math
from prefpipe.schemas import Message

QUESTION = [Message(role="user", content="?")]
CASES = [
    ("42", "The answer is 42.", 1.0, "ok"),
    ("42", "41, no: 42", 1.0, "ok"),
    ("42", "It is 41", 0.0, "wrong"),
    (r"\frac{1}{2}", r"so \boxed{0.5}", 1.0, "ok"),
    ("1/2", r"$\frac{2}{4}$", 1.0, "ok"),
    ("5 + 3 = 8\n#### 1,234", "1234", 1.0, "ok"),
    ("x+1", "$1+x$", 1.0, "ok"),
    (r"\sqrt{2}", "$1.41421356$", 1.0, "ok"),
    ("(1,2)", "$(2,1)$", 0.0, "wrong"),
    ("42", "no idea", 0.0, "unparsable"),
    ("42", "", 0.0, "unparsable"),
    (None, "3", None, "unparsable"),
    ("", "3", None, "unparsable"),
]


@pytest.fixture(scope="module")
def rate() -> RewardFunction:
    return math(Math(timeout_seconds=60, num_workers=1))


@pytest.fixture(scope="module")
def impatient() -> RewardFunction:
    return math(Math(timeout_seconds=3, num_workers=1))


@pytest.mark.parametrize(("answer", "text", "reward", "status"), CASES)
def test_answers(rate: RewardFunction, answer: str | None, text: str, reward: float | None, status: str) -> None:
    (scored,) = rate([Answer(QUESTION, text, answer)])
    assert (scored.reward, scored.status) == (reward, status)
    assert (scored.detail is None) == (status == "ok")


def test_a_batch_is_rated_as_its_rows_are(rate: RewardFunction) -> None:
    together = rate([Answer(QUESTION, text, answer) for answer, text, _, _ in CASES])
    assert [(s.reward, s.status) for s in together] == [(reward, status) for _, _, reward, status in CASES]


@pytest.mark.parametrize("text", ["9999999999**9999999999**99999", "$" + "(" * 3000 + "1" + ")" * 3000 + "$"])
def test_an_expression_without_an_end_is_a_timeout_and_no_zero(impatient: RewardFunction, text: str) -> None:
    endless, fine = impatient([Answer(QUESTION, text, "7"), Answer(QUESTION, "7", "7")])
    assert (endless.reward, endless.status) == (None, "timeout")
    assert fine == Scored(1.0)


def test_it_works_from_a_thread_where_the_package_alone_refuses(rate: RewardFunction) -> None:
    found: list[Scored] = []
    thread = threading.Thread(target=lambda: found.extend(rate([Answer(QUESTION, "7", "7")])))
    thread.start()
    thread.join()
    assert found == [Scored(1.0)]


def test_precision_decides_when_numbers_agree() -> None:
    assert check("0.333333", "$0.3333334$", 6)[0] == "ok"
    assert check("0.333333", "$0.3334$", 6)[0] == "wrong"
    assert check("0.333333", "$0.3334$", 3)[0] == "ok"


def test_another_version_of_the_checker_is_another_reward() -> None:
    assert set(inputs(Math())) == {"math_verify"}
