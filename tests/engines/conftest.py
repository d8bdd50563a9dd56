"""Surroundings of tests that ask servers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefpipe.engines import server_pool
from tests.conftest import COMMANDS, Cli, through
from tests.forge import TRAIN, forge


@pytest.fixture(scope="session")
def kept_canaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache of these tests: canaries of a model are computed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch, kept_canaries: Path) -> None:
    """No proxy, no key, short pauses, and a cache that is not the user's."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept_canaries))
    monkeypatch.setattr(server_pool, "BACKOFF_SECONDS", 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture(scope="session")
def vllm_cli() -> Iterator[Cli]:
    """As `cli`, by processes that have imported vLLM already: ten seconds of a command."""
    with forge(*TRAIN, *COMMANDS, "tests.engines.vllm_loaded") as running:
        yield through(running)
