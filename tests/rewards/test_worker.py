"""The serving side of isolation, as its lines on standard input and output."""

import json
import subprocess
import sys

from prefpipe.rewards import worker
from tests.conftest import ROOT


def serve(function: str, *lines: str, seconds: float = 20) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-m", "prefpipe.rewards.worker", f"tests.rewards.checkers:{function}", str(seconds)],
        input="".join(line + "\n" for line in lines), capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_one_line_answers_one_line_whatever_the_function_prints() -> None:
    assert serve("double", "[1]", "[2]") == [{"value": v, "status": "ok", "detail": None} for v in (2, 4)]


def test_long_arguments_and_values_pass_whole() -> None:
    text = "x" * 300_000
    (found,) = serve("behave", json.dumps([text]))
    assert found["value"] == text


def test_after_a_hang_the_next_line_is_answered() -> None:
    hung, fine = serve("behave", '["hang"]', '["fine"]', seconds=1)
    assert (hung["status"], fine["value"]) == ("timeout", "fine")


def test_answer_is_a_value_or_what_was_raised() -> None:
    assert worker.answer(lambda x: x + 1, [1]) == {"value": 2, "status": "ok", "detail": None}
    assert worker.answer(lambda: 1 / 0, [])["detail"] == "ZeroDivisionError: division by zero"
