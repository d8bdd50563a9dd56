"""The endpoint over real sockets: what is sent, retries, refusals, time limits, and a key that goes nowhere."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config.judge import Judge
from prefpipe.errors import StorageError, UsageError
from prefpipe.rewards.endpoint import Question, Reply, ask_all, body
from tests.conftest import Cli
from tests.rewards.server import completion, serving
from tests.serving import nobody

SCHEMA = {"type": "object"}
QUESTIONS = [Question([{"role": "user", "content": str(i)}], SCHEMA) for i in range(8)]
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def settings(base_url: str, **more: Any) -> Judge:
    return Judge(**{"base_url": base_url, "backoff_seconds": 0, "retries": 2, "timeout_seconds": 10, **more})


def echo(request: dict[str, Any]) -> tuple[int, Any]:
    return completion(request["messages"][0]["content"])


def in_turn(*answers: Any) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    left = list(answers)
    return lambda _request: left.pop(0) if len(left) > 1 else left[0]


def test_replies_come_in_the_order_of_the_questions_and_several_at_once() -> None:
    arrived, answered = threading.Event(), threading.Event()

    def first_is_last(request: dict[str, Any]) -> tuple[int, Any]:
        if request["messages"][0]["content"] == "0":
            arrived.set()
            answered.wait()
        arrived.wait()
        answered.set()
        return echo(request)

    with serving(first_is_last) as endpoint:
        assert ask_all(settings(endpoint.base_url, concurrency=4), QUESTIONS) == [Reply(str(i)) for i in range(8)]
    assert 2 <= endpoint.busiest <= 4
    assert {r["path"] for r in endpoint.requests} == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    ("structured", "expected"),
    [
        ("json_schema", {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}),
        ("json_object", {"type": "json_object"}),
        ("none", None),
    ],
)
def test_the_request(structured: str, expected: object) -> None:
    made = body(Judge(model="m", temperature=0.5, max_tokens=7), QUESTIONS[3], structured)
    assert made.get("response_format") == expected
    assert (made["model"], made["temperature"], made["max_tokens"]) == ("m", 0.5, 7)
    assert made["messages"] == [{"role": "user", "content": "3"}]


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503])
def test_what_may_go_well_is_asked_again(code: int) -> None:
    with serving(in_turn((code, {}), (code, {}), completion("fine"))) as endpoint:
        assert ask_all(settings(endpoint.base_url), QUESTIONS[:1]) == [Reply("fine")]
    assert len(endpoint.requests) == 3


def test_a_row_that_the_endpoint_fails_on_is_a_crash_after_all_retries() -> None:
    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        return (500, {"error": "no"}) if request["messages"][0]["content"] == "1" else echo(request)

    with serving(answer) as endpoint:
        first, bad, third = ask_all(settings(endpoint.base_url, retries=1, concurrency=1), QUESTIONS[:3])
    assert (first, third) == (Reply("0"), Reply("2"))
    assert bad == Reply(None, "crash", '500 {"error": "no"}')
    assert len(endpoint.requests) == 4


def test_a_bad_request_among_good_ones_is_a_crash_at_once() -> None:
    with serving(in_turn(completion("fine"), (400, {"error": "too long"}))) as endpoint:
        assert ask_all(settings(endpoint.base_url, concurrency=1), QUESTIONS[:2]) == [
            Reply("fine"), Reply(None, "crash", '400 {"error": "too long"}'),
        ]  # fmt: skip
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("code", [400, 422, 500])
@pytest.mark.parametrize(
    ("structured", "known", "way_out"),
    [
        ("json_schema", {"json_object", "none"}, "json_object"),
        ("json_schema", {"none"}, "none"),
        ("json_object", {"none"}, "none"),
    ],
)
def test_a_format_that_the_endpoint_does_not_know_stops_the_run(
    code: int, structured: str, known: set[str], way_out: str
) -> None:
    """One error that names the setting which the endpoint answers, whatever words it has for the refusal."""

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        form = request.get("response_format", {"type": "none"})["type"]
        return echo(request) if form in known else (code, {"detail": "no"})

    with serving(answer) as endpoint:
        with pytest.raises(UsageError, match=f'does not take structured = "{structured}": {code}') as caught:
            ask_all(settings(endpoint.base_url, structured=structured, retries=0), QUESTIONS)
        assert f'structured = "{way_out}"' in caught.value.hint
        right = settings(endpoint.base_url, structured=way_out)
        assert ask_all(right, QUESTIONS) == [Reply(str(i)) for i in range(8)]


def test_a_question_that_is_refused_in_every_format_is_its_own_fault() -> None:
    with serving(in_turn((400, {"error": "too long"}))) as endpoint:
        assert ask_all(settings(endpoint.base_url), QUESTIONS[:1]) == [
            Reply(None, "crash", '400 {"error": "too long"}')
        ]
    forms = [r.get("response_format", {"type": "none"})["type"] for r in endpoint.requests]
    assert forms == ["json_schema", "json_object", "none"]


def test_a_failure_that_passes_is_not_blamed_on_the_format() -> None:
    """The looser format goes well, and so does the same request again."""
    with serving(in_turn((500, {}), completion("loose"), completion("fine"))) as endpoint:
        assert ask_all(settings(endpoint.base_url, retries=0), QUESTIONS[:1]) == [Reply("fine")]


def test_through_the_command_line_the_format_is_named_and_nothing_is_filled_with_crashes(
    cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        return (422, {"detail": "extra fields"}) if "response_format" in request else completion('{"rating": 7}')

    with serving(answer) as endpoint:
        table = {"j": {"kind": "judge", "base_url": endpoint.base_url}}
        done = cli("generate", "--model", tiny_model, "--engine", "fake", "--prompts", prompts_file, "--num-samples", 3,
                   "--rewards", "j", "--reward-settings", json.dumps(table), "--out", tmp_path / "g")  # fmt: skip
    assert done.returncode == 2
    assert 'does not take structured = "json_schema": 422' in done.stderr
    assert 'hint: set structured = "none"' in done.stderr
    assert not list((tmp_path / "g").rglob("rewards/j/*.parquet"))


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_refusal_stops_the_run(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(in_turn((code, {"error": "who are you"}))) as endpoint:
        with pytest.raises(UsageError, match=f"without a key .*: {code}") as caught:
            ask_all(settings(endpoint.base_url), QUESTIONS)
        assert "OPENAI_API_KEY" in caught.value.hint
        monkeypatch.setenv("MY_KEY", KEY)
        with pytest.raises(UsageError, match="with the key in MY_KEY"):
            ask_all(settings(endpoint.base_url, api_key_env="MY_KEY"), QUESTIONS)


def test_overload_and_an_endpoint_that_is_not_there_stop_the_run() -> None:
    """Rather than rows without rewards: the run resumes when the endpoint is back."""
    with serving(in_turn((429, {}))) as endpoint, pytest.raises(StorageError, match="no more requests"):
        ask_all(settings(endpoint.base_url), QUESTIONS)
    with nobody() as port, pytest.raises(StorageError, match="cannot be reached"):
        ask_all(settings(f"http://127.0.0.1:{port}/v1"), QUESTIONS)


def test_no_answer_in_time_is_a_timeout_of_that_row() -> None:
    over = threading.Event()

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        if request["messages"][0]["content"] == "1":
            over.wait()
        return echo(request)

    with serving(answer) as endpoint:
        fine, late = ask_all(settings(endpoint.base_url, timeout_seconds=2, retries=1), QUESTIONS[:2])
        over.set()
    assert fine == Reply("0")
    assert late == Reply(None, "timeout", "no answer within 2 s, asked 2 times")


def test_the_key_is_sent_and_stands_in_nothing_that_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(in_turn(completion(f"your key is {KEY}"), (400, {"error": f"bad {KEY}"}))) as endpoint:
        told, refused = ask_all(settings(endpoint.base_url, concurrency=1), QUESTIONS[:2])
    assert [h["authorization"] for h in endpoint.headers] == [f"Bearer {KEY}"] * 2
    assert KEY not in json.dumps(endpoint.requests)
    assert told.text == "your key is ***"
    assert KEY not in (refused.detail or "")


def test_without_a_key_none_is_sent_and_redirects_are_not_followed() -> None:
    with serving(in_turn((302, ({}, {"location": "http://127.0.0.1:1/steal"})))) as endpoint:
        (reply,) = ask_all(settings(endpoint.base_url), QUESTIONS[:1])
    assert "authorization" not in endpoint.headers[0]
    assert (reply.status, len(endpoint.requests)) == ("crash", 1)


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (
            completion("half of a ver", "length"),
            Reply(None, "unparsable", "the judge's answer is cut at max_tokens = 512"),
        ),
        (completion(None), Reply(None, "unparsable", "the judge's answer is empty")),
        (completion("  "), Reply(None, "unparsable", "the judge's answer is empty")),
        ((200, b"<html>"), Reply(None, "crash", "no chat completion: <html>")),
        ((200, {"choices": []}), Reply(None, "crash", 'no chat completion: {"choices": []}')),
        ((200, []), Reply(None, "crash", "no chat completion: []")),
    ],
)
def test_answers_that_are_none(answer: tuple[int, Any], reply: Reply) -> None:
    with serving(in_turn(answer)) as endpoint:
        assert ask_all(settings(endpoint.base_url), QUESTIONS[:1]) == [reply]
