"""What a server is and has: found out before anything is asked, and refused with the way out."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from prefpipe import engines
from prefpipe.errors import UsageError
from tests.engines.standin import PATHS, Standin, running, settings

pytestmark = pytest.mark.usefixtures("servers")


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
def test_the_scorer_names_what_the_server_says_that_it_is(protocol: str, tiny_model: Path) -> None:
    with running(Standin(tiny_model, protocol=protocol)) as there:
        for url in (there.base_url, f"{there.base_url}/v1"):
            with engines.load("server", settings(tiny_model, url)) as engine:
                build = {"sglang": "sglang-0.5.9"}.get(protocol, "vllm-0.32.0")
                assert engine.scorer == f"server:{build}/float32"


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({}, "is neither vLLM nor SGLang"),
        ({"/version": (200, {"version": "1"})}, "lists no model"),
        ({"/version": (200, {"version": "1"}), "/v1/models": (200, {"data": []})}, "lists no model"),
        ({"/version": (200, b"<html>")}, "answers what is no JSON: <html>"),
        ({"/version": (418, {})}, "refuses a request: 418"),
    ],
)
def test_what_is_no_such_server_is_named(tiny_model: Path, answers: dict[str, Any], words: str) -> None:
    standin = Standin(tiny_model, refuse=lambda request: answers.get(request["path"], (404, {})))
    with running(standin) as there, pytest.raises(UsageError, match=words):
        engines.load("server", settings(tiny_model, there.base_url))


def test_a_server_without_room_for_the_longest_sequence_is_refused(tiny_model: Path) -> None:
    """One token more than prompt and completion: scoring a completion of full length asks for one."""
    with running(Standin(tiny_model, room=256)) as there, pytest.raises(UsageError, match="takes 256 tokens") as caught:
        engines.load("server", settings(tiny_model, there.base_url))
    assert "room for 257" in caught.value.hint
    with running(Standin(tiny_model, room=257)) as there, engines.load("server", settings(tiny_model, there.base_url)):
        pass


def test_servers_of_two_builds_are_not_one_engine(tiny_model: Path) -> None:
    with (
        running(Standin(tiny_model)) as a,
        running(Standin(tiny_model, protocol="sglang")) as b,
        pytest.raises(UsageError, match="the servers are not the same"),
    ):
        engines.load("server", settings(tiny_model, a.base_url, b.base_url))
