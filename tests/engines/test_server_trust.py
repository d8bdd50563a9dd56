"""A server that lies is refused before it is asked, and one that begins to lie yields nothing more."""

import dataclasses
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefpipe import engines, machine
from prefpipe.engines.server_pool import Job, Server
from prefpipe.engines.server_protocols import Said, Sampling
from prefpipe.engines.server_trust import Trust
from prefpipe.errors import DataError, IdentityError, StorageError
from prefpipe.forward import load
from prefpipe.models.chat import load_chat
from tests.engines.standin import PATHS, Standin, collect, requests, running, sequences, settings

pytestmark = pytest.mark.usefixtures("servers")


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


def test_a_server_that_leaves_the_adapter_out_is_refused(tiny_model: Path, tiny_adapter: Path) -> None:
    standin = Standin(tiny_model, adapter=tiny_adapter, lies={"no_adapter"})
    with running(standin) as there, pytest.raises(IdentityError, match=r"just what it gives for (its base|weights:)"):
        engines.load("server", settings(tiny_model, there.base_url, adapter=str(tiny_adapter)))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache in which no policy is known; returns the folder of canaries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "prefpipe" / "canaries"


def test_a_policy_that_fits_here_is_computed_once_and_decides(
    fresh: Path, tiny_model: Path, other_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(Standin(tiny_model)) as there:
        for _ in range(2):
            with engines.load("server", settings(tiny_model, there.base_url)):
                pass
    said = capsys.readouterr().err
    assert said.count("scoring 4 canaries here, once") == 1
    assert "is its claim" not in said
    (record,) = fresh.rglob("*.json")
    assert list(json.loads(record.read_text())["values"]) == [
        load.scorer_name("float32"), "server:vllm-0.32.0/float32"]  # fmt: skip
    with running(Standin(other_model)) as there, pytest.raises(IdentityError, match="holds other weights"):
        engines.load("server", settings(tiny_model, there.base_url))


def test_where_it_does_not_fit_the_first_server_is_believed_and_the_next_one_compared(
    fresh: Path,
    tiny_model: Path,
    other_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 0)
    with running(Standin(tiny_model)) as there, engines.load("server", settings(tiny_model, there.base_url)):
        assert "is its claim: nothing is known from a forward pass here" in capsys.readouterr().err
    with (
        running(Standin(other_model)) as there,
        pytest.raises(IdentityError, match=r"from what server:vllm-0\.32\.0/float32 gave") as caught,
    ):
        engines.load("server", settings(tiny_model, there.base_url))
    (record,) = fresh.rglob("*.json")
    assert str(record) in caught.value.message
    with (
        running(Standin(tiny_model)) as there,
        pytest.raises(IdentityError, match="just what it gives for weights:") as caught,
    ):
        engines.load("server", settings(other_model, there.base_url))


def test_a_connection_that_never_lasts_is_an_error(
    fresh: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers rightly, and its connection is lost in every proof."""
    monkeypatch.setattr(machine, "available_memory", lambda: 0)

    def ask(server: Server, job: Job, sampling: Sampling | None) -> Any:
        server.losses += 1
        return Said([2], [-1.0], "stop") if sampling else [-1.0] * (len(job.ids) - job.parts)

    trust = Trust(settings(tiny_model), "server:vllm-1/float32", ask)
    with pytest.raises(StorageError, match="is lost again and again"):
        trust.prove(Server("http://a"), adapter=True)
    assert list(fresh.rglob("*.json"))
