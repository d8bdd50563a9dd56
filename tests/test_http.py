"""Requests as values: answers, sizes, deadlines and pauses. tests/rewards has what odd endpoints do to a judge."""

import asyncio
import threading
from typing import Any

import pytest

from prefpipe import http
from prefpipe.api_key import ApiKey
from prefpipe.http import Answer
from tests.rewards.server import serving
from tests.serving import nobody

KEY = "sk-nobody-may-see-this-0"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def ask(url: str, value: object = None, *, timeout: float = 60, **more: Any) -> Answer:
    async def run() -> Answer:
        link = http.link([url], "base_url", ApiKey(KEY), timeout, 2)
        async with link.client:
            return await http.ask(link, url, value, **more)

    return asyncio.run(run())


def test_a_value_is_posted_and_nothing_is_a_get() -> None:
    with serving(lambda request: (200, request)) as endpoint:
        assert '"a": 1,' in ask(endpoint.base_url, {"a": 1}).text
        answer = ask(endpoint.base_url)
    assert (answer.status, answer.is_transient) == (200, False)
    assert [r["method"] for r in endpoint.requests] == ["POST", "GET"]
    assert endpoint.headers[1]["authorization"] == f"Bearer {KEY}"


def test_an_answer_has_a_largest_size() -> None:
    with serving(lambda _request: (200, "x" * 1000)) as endpoint:
        assert ask(endpoint.base_url, {}, most_bytes=2000).status == 200
        large = ask(endpoint.base_url, {}, most_bytes=100)
    assert (large.status, large.text) == (502, "an answer of more than 100 bytes")


def test_what_does_not_come_is_a_value() -> None:
    over = threading.Event()
    with serving(lambda _request: over.wait() and (200, {})) as endpoint:
        late = ask(endpoint.base_url, {}, timeout=1)
        over.set()
    assert (late.failure, late.is_transient) == ("late", True)
    with nobody() as port:
        gone = ask(f"http://127.0.0.1:{port}", {})
    assert (gone.failure, gone.is_transient) == ("unreachable", True)


def test_the_key_is_cut_out_of_an_answer() -> None:
    with serving(lambda _request: (400, {"said": f"bad {KEY}"})) as endpoint:
        assert ask(endpoint.base_url, {}).text == '{"said": "bad ***"}'


def test_what_still_runs_in_a_loop_is_cancelled_when_its_block_ends() -> None:
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with http.loop_in_thread() as loop:
        waiting = asyncio.run_coroutine_threadsafe(wait(), loop)
        assert asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "done"), loop).result(60) == "done"
    assert ended.is_set()
    assert waiting.cancelled()
    assert "http" not in {thread.name for thread in threading.enumerate()}


def test_pauses_double_and_heed_the_service_up_to_a_minute() -> None:
    assert [http.pause(0.5, n, None) for n in range(4)] == [0.5, 1.0, 2.0, 4.0]
    assert http.pause(0.5, 0, "7") == 7.0
    assert http.pause(0.5, 9, None) == 60.0
    assert http.pause(0.5, 0, "3600") == 60.0
    assert http.pause(0.5, 0, "Wed, 21 Oct 2026 07:28:00 GMT") == 0.5


@pytest.mark.parametrize("retry_after", ["²", "-1", "nan", "inf", "1e9", "9" * 400, "", "٣"])
def test_odd_pauses_are_none(retry_after: str) -> None:
    assert http.pause(0.5, 0, retry_after) == 0.5
