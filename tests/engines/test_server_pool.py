"""Which server a request goes to, when it is sent again, and what never meets at a server."""

import dataclasses
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefpipe import engines
from prefpipe.engines import server_pool
from prefpipe.errors import StorageError, UsageError
from prefpipe.models.chat import Chat
from tests.engines.standin import Standin, collect, distance, requests, running, sequences, settings

KEY = "sk-nobody-may-see-this-0"

pytestmark = pytest.mark.usefixtures("servers")


def test_two_servers_share_the_work_and_one_that_dies_leaves_it_to_the_other(tiny_model: Path, chat: Chat) -> None:
    first, second = Standin(tiny_model), Standin(tiny_model)
    with running(first) as a, running(second) as b:
        with engines.load("server", settings(tiny_model, a.base_url, b.base_url)) as engine:
            expected = collect(engine, requests(chat, 12))
            counts = Counter(len(s.asked) > 12 for s in (first, second))
            second.refuse = lambda _request: None  # closes every connection without a word
            found = collect(engine, requests(chat, 12))
        assert counts == {True: 2}
    assert found == expected


@pytest.mark.parametrize("failure", [(503, {}), (429, {}), (500, {}), None])
def test_what_fails_once_is_asked_again_with_its_seed(failure: Any, tiny_model: Path, chat: Chat) -> None:
    standin = Standin(tiny_model)
    with running(standin) as there, engines.load("server", settings(tiny_model, there.base_url)) as engine:
        expected = collect(engine, requests(chat))
        calls = iter(range(1000))
        standin.refuse = lambda request: failure if next(calls) in (3, 5, 11) and request["method"] == "POST" else False
        assert collect(engine, requests(chat)) == expected
    assert next(calls) > 15


def test_an_adapter_goes_by_its_name_and_never_meets_its_base(tiny_model: Path, tiny_adapter: Path, chat: Chat) -> None:
    """One batch of both kills vLLM on a CPU."""
    standin = Standin(tiny_model, adapter=tiny_adapter)
    wanted = settings(tiny_model, adapter=str(tiny_adapter))
    with (
        running(standin) as there,
        engines.load("server", dataclasses.replace(wanted, base_urls=(there.base_url,))) as engine,
        engines.load("transformers", wanted) as here,
    ):
        sampling = engine.generate(requests(chat, 8))
        first, samples = next(sampling)
        base = dict(engine.score(sequences(chat, {first.prompt_id: samples}), adapter=False))
        found = {first.prompt_id: samples} | {r.prompt_id: s for r, s in sampling}
        given = sequences(chat, {first.prompt_id: samples})
        on, off = (dict(here.score(given, adapter=adapter)) for adapter in (True, False))
    assert len(found) == 8
    assert standin.names == {f"adapter-{wanted.policy.adapter_weights}"}
    assert distance(base, off) < 1e-4
    assert distance({f"p0/{s.sample_index}": s.token_logps for s in samples}, on) < 1e-4
    assert distance(on, off) > 0.01
    assert standin.met == {frozenset({"adapter"}), frozenset({"base"})}


def test_a_key_is_sent_and_a_refusal_names_its_variable(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    standin = Standin(tiny_model)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with running(standin) as there:
        with engines.load("server", settings(tiny_model, there.base_url)):
            pass
        assert {headers["authorization"] for headers in there.headers} == {f"Bearer {KEY}"}
        standin.refuse = lambda _request: (401, {"error": f"who is {KEY}?"})
        with pytest.raises(UsageError, match="the key in VLLM_API_KEY: 401") as caught:
            engines.load("server", settings(tiny_model, there.base_url))
    assert KEY not in caught.value.message + capsys.readouterr().err


def test_a_server_that_stays_away_stops_the_run_with_all_that_is_proved(
    tiny_model: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_pool, "_RETRIES", 2)
    standin = Standin(tiny_model)
    with running(standin) as there, engines.load("server", settings(tiny_model, there.base_url)) as engine:
        standin.refuse = lambda _request: None
        with pytest.raises(StorageError, match="cannot be reached") as caught:
            collect(engine, requests(chat))
    assert "the same command resumes" in caught.value.hint
    assert caught.value.exit_code == 74


def test_one_that_is_late_is_named_with_its_limit(tiny_model: Path, chat: Chat) -> None:
    standin, gate = Standin(tiny_model), threading.Event()
    with (
        running(standin) as there,
        engines.load("server", settings(tiny_model, there.base_url, timeout_seconds=3.0)) as engine,
    ):
        standin.refuse = lambda request: request["method"] == "POST" and gate.wait() and False
        with pytest.raises(StorageError, match="no answer within 3 s, asked 2 times"):
            collect(engine, requests(chat))
        gate.set()
