"""The engine behind a URL against a server that computes with the tiny model: the values of an engine in the process,
nothing twice, and nothing left under way."""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefpipe import engines
from prefpipe.engines.base import Query, Request
from prefpipe.errors import PrefpipeError
from prefpipe.models.chat import Chat
from prefpipe.models.encoding import encode
from tests.engines.standin import (
    DRAWS,
    MAX_TOKENS,
    PATHS,
    WINDOW,
    Standin,
    collect,
    distance,
    requests,
    running,
    sequences,
    settings,
)

pytestmark = pytest.mark.usefixtures("servers")


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


@pytest.mark.parametrize("window", [1, 2, 50])
def test_any_window_serves_every_draw(window: int, tiny_model: Path, chat: Chat) -> None:
    with (
        running(Standin(tiny_model)) as there,
        engines.load("server", settings(tiny_model, there.base_url, max_num_seqs=window)) as engine,
    ):
        found = collect(engine, requests(chat, 7))
        assert collect(engine, []) == {}
    assert {name: len(samples) for name, samples in found.items()} == {f"p{n}": 3 for n in range(7)}


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
