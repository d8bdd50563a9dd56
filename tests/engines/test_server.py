"""The engine behind a URL against a server that computes with the tiny model: the values of an engine in the process,
nothing twice, and nothing of a server that is not what it should be."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefpipe import engines
from prefpipe.engines import server_pool
from prefpipe.engines.base import Draw, Engine, EngineSettings, Query, Request, Sample, ScoreRequest
from prefpipe.errors import DataError, IdentityError, PrefpipeError, StorageError, UsageError
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import encode
from prefpipe.models.policy import resolve
from tests.engines.standin import PATHS, Standin, running
from tests.tiny import make_adapter

MAX_TOKENS, WINDOW = 6, 3
DRAWS = (Draw(0, 0, 0.0), Draw(1, 11, 1.0), Draw(2, 12, 0.7))
KEY = "sk-nobody-may-see-this-0"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, short pauses, and a cache of canaries for each test."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(server_pool, "BACKOFF_SECONDS", 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture(scope="module")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "one", seed=3)


def settings(model: Path, *urls: str, adapter: str = "none", **more: Any) -> EngineSettings:
    made = EngineSettings(resolve(str(model), adapter), load_chat(model), "float32", 0.9, MAX_TOKENS, 256, WINDOW, 64)
    return dataclasses.replace(
        made, **{"base_urls": urls, "api_key_env": "VLLM_API_KEY", "timeout_seconds": 20.0, **more}
    )


def requests(chat: Chat, count: int = 5) -> list[Request]:
    return [Request(f"p{n}", encode(chat, f"bird {n}" + "!" * n), DRAWS) for n in range(count)]


def collect(engine: Engine, given: Iterator[Request] | list[Request]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for request, samples in engine.generate(given):
        assert request.prompt_id not in found
        found[request.prompt_id] = samples
    return found


def sequences(chat: Chat, samples: dict[str, list[Sample]]) -> list[ScoreRequest]:
    prompts = {r.prompt_id: r.prompt_token_ids for r in requests(chat)}
    return [ScoreRequest(f"{n}/{s.sample_index}", prompts[n], s.token_ids) for n, own in samples.items() for s in own]


def distance(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    assert a.keys() == b.keys()
    return max(abs(x - y) for key in a for x, y in zip(a[key], b[key], strict=True))


@pytest.mark.parametrize("protocol", PATHS)
def test_it_gives_what_an_engine_in_the_process_gives(protocol: str, tiny_model: Path, chat: Chat) -> None:
    """Every draw once, in its place; raw log-probs; scores, also masked; the same draws again in another order."""
    with (
        running(Standin(tiny_model, protocol=protocol)) as there,
        engines.load("server", settings(tiny_model, there.base_url)) as engine,
        engines.load("transformers", settings(tiny_model)) as here,
    ):
        assert engine.scorer == f"server:{Standin(tiny_model, protocol=protocol).build}/float32"
        samples = collect(engine, requests(chat))
        again = collect(engine, requests(chat)[::-1])
        given = sequences(chat, samples)
        scored = dict(engine.score(given, adapter=True))
        masked = dataclasses.replace(given[1], loss_mask=[n % 2 == 0 for n in range(len(given[1].token_ids))])
        ((_, some),) = engine.score([masked], adapter=False)
        truth = dict(here.score(given, adapter=True))
        greedy = collect(here, [dataclasses.replace(r, draws=DRAWS[:1]) for r in requests(chat)])
    captured = {f"{n}/{s.sample_index}": s.token_logps for n, own in samples.items() for s in own}
    assert [[s.sample_index for s in own] for own in samples.values()] == [[0, 1, 2]] * 5
    assert distance(captured, truth) < 1e-4
    assert distance(scored, truth) < 1e-4
    assert some == pytest.approx(masked.scored(scored[masked.completion_id]), abs=1e-5)
    assert {n: own[0].token_ids for n, own in samples.items()} == {n: own[0].token_ids for n, own in greedy.items()}
    assert {n: [s.token_ids for s in own] for n, own in again.items()} == {
        n: [s.token_ids for s in own] for n, own in samples.items()
    }
    assert {request["path"] for request in there.requests if request["method"] == "POST"} == {PATHS[protocol]}
    assert there.busiest <= WINDOW + 1


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


def test_what_came_before_a_connection_was_lost_is_asked_for_again(tiny_model: Path, other_model: Path) -> None:
    """The server is another process then: what it gave since the last check is not proved by a check of the new one."""
    chat, standin = load_chat(tiny_model), Standin(tiny_model, other_model)
    with running(standin) as there, engines.load("server", settings(tiny_model, there.base_url)) as engine:
        expected = collect(engine, requests(chat))
        asked = Counter[int]()
        lock = threading.Lock()

        def swapped_until_it_dies(request: Any) -> Any:
            with lock:
                asked["all"] += 1
                if asked["all"] == 8:
                    standin.lies.discard("swapped")
                    return None
            return False

        standin.lies.add("swapped")
        standin.refuse = swapped_until_it_dies
        assert collect(engine, requests(chat)) == expected


LIES = {
    "truncates": (DataError, "other token ids than those that were sent"),
    "retokenises": (DataError, "other token ids than those that were sent"),
    "hides": (IdentityError, "holds other weights"),
    "processed": (DataError, "does not return raw log-probs"),
    "cuts": (DataError, "an answer was cut at 3 tokens"),
    "infinite": (DataError, "a log-prob is -9999"),
    "swapped": (IdentityError, "holds other weights"),
}


@pytest.mark.parametrize("protocol", PATHS)
@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_is_refused_before_it_is_asked(
    lie: str, protocol: str, tiny_model: Path, other_model: Path
) -> None:
    kind, words = LIES[lie]
    standin = Standin(tiny_model, other_model, protocol=protocol, lies={lie})
    with running(standin) as there, pytest.raises(kind, match=words) as caught:
        engines.load("server", settings(tiny_model, there.base_url))
    assert there.base_url in caught.value.message


@pytest.mark.parametrize("lie", ["truncates", "hides", "cuts", "swapped", "infinite", "runs_on", "labelled"])
def test_a_server_that_begins_to_lie_yields_nothing_more(lie: str, tiny_model: Path, other_model: Path) -> None:
    """Also what it gave before the check that finds it out: nobody knows since when it lies."""
    chat, standin = load_chat(tiny_model), Standin(tiny_model, other_model)
    expected = {"hides": IdentityError, "swapped": IdentityError, "labelled": IdentityError}.get(lie, DataError)
    with running(standin) as there, engines.load("server", settings(tiny_model, there.base_url)) as engine:
        good = collect(engine, requests(chat, 1))
        standin.lies.add(lie)
        more = [dataclasses.replace(r, prompt_id=f"more-{r.prompt_id}") for r in requests(chat, 30)]
        with pytest.raises(expected):
            good |= collect(engine, more)
    assert good.keys() == {"p0"}


def test_a_swap_in_the_middle_of_scoring_is_found(tiny_model: Path, other_model: Path) -> None:
    chat, standin = load_chat(tiny_model), Standin(tiny_model, other_model)
    with running(standin) as there, engines.load("server", settings(tiny_model, there.base_url)) as engine:
        given = sequences(chat, collect(engine, requests(chat)))
        begun = len(standin.asked)
        standin.refuse = lambda _r: standin.lies.add("swapped") or False if len(standin.asked) > begun + 8 else False
        with pytest.raises(IdentityError, match="from what it gave at the start"):
            dict(engine.score(given, adapter=True))


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


def test_a_server_that_leaves_the_adapter_out_is_refused(tiny_model: Path, tiny_adapter: Path) -> None:
    standin = Standin(tiny_model, adapter=tiny_adapter, lies={"no_adapter"})
    with running(standin) as there, pytest.raises(IdentityError, match="just what it gives for its base"):
        engines.load("server", settings(tiny_model, there.base_url, adapter=str(tiny_adapter)))


def test_a_server_that_cannot_load_the_adapter_is_refused_with_the_way_out(
    tiny_model: Path, tiny_adapter: Path
) -> None:
    standin = Standin(tiny_model, adapter=tiny_adapter, loads_adapters=False)
    wanted = settings(tiny_model, adapter=str(tiny_adapter))
    name = f"adapter-{wanted.policy.adapter_weights}"
    with running(standin) as there:
        wanted = dataclasses.replace(wanted, base_urls=(there.base_url,))
        with pytest.raises(UsageError, match=f"has no adapter {name}") as caught:
            engines.load("server", wanted)
        assert f"--lora-modules {name}={tiny_adapter}" in caught.value.hint
        standin.names.add(name)  # as a server has it that was started with it
        with engines.load("server", wanted) as engine:
            assert engine.scorer.startswith("server:vllm")


@pytest.mark.parametrize("protocol", PATHS)
def test_an_answer_under_a_schema_asks_for_a_grammar(protocol: str, tiny_model: Path, chat: Chat) -> None:
    schema = {"type": "object", "properties": {"rating": {"enum": [1, 2]}}}
    standin = Standin(tiny_model, protocol=protocol)
    with running(standin) as there, engines.load("server", settings(tiny_model, there.base_url)) as engine:
        given = [Query("free", encode(chat, "a"), 1, 0.0, None), Query("held", encode(chat, "b"), 1, 0.0, schema)]
        answers = {query.query_id: response for query, response in engine.respond(given)}
    assert answers.keys() == {"free", "held"}
    assert all(1 <= len(answer.token_ids) <= MAX_TOKENS for answer in answers.values())
    assert sum("rating" in str(request) for request in standin.asked) == 1


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
        engines.load("server", settings(tiny_model, there.base_url, timeout_seconds=1.0)) as engine,
    ):
        standin.refuse = lambda request: request["method"] == "POST" and gate.wait(20) and False
        with pytest.raises(StorageError, match="no answer within 1 s, asked 2 times"):
            collect(engine, requests(chat))
        gate.set()


def test_a_consumer_that_stops_leaves_nothing_under_way(tiny_model: Path, chat: Chat) -> None:
    with running(Standin(tiny_model)) as there, engines.load("server", settings(tiny_model, there.base_url)) as engine:
        stopped = engine.generate(requests(chat, 40))
        next(stopped)
        stopped.close()  # type: ignore[attr-defined]  # a generator
        assert len(collect(engine, requests(chat))) == 5
    assert "http" not in {thread.name for thread in threading.enumerate()}


def test_an_error_of_the_rows_is_theirs(tiny_model: Path, chat: Chat) -> None:
    def rows() -> Iterator[Request]:
        yield from requests(chat, 2)
        raise PrefpipeError("no more rows", "")

    with (
        running(Standin(tiny_model)) as there,
        engines.load("server", settings(tiny_model, there.base_url)) as engine,
        pytest.raises(PrefpipeError, match="no more rows"),
    ):
        collect(engine, rows())
