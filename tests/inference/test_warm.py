"""An engine goes on into the next step where that asks for the same, and closes in every other case."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefpipe import engines
from prefpipe.engines.base import EngineSettings
from prefpipe.engines.fake import FakeEngine
from prefpipe.errors import DataError
from prefpipe.inference import warm
from prefpipe.inference.pool import Inline, open_pool
from prefpipe.inference.pool_size import Size
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.policy import Policy, resolve

started: list["Watched"] = []


class Watched(FakeEngine):
    """A fake engine that knows whether it is open, and with which policy; `rank` is that of the adapters it takes."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.rank = settings.lora_rank
        self.policy = settings.policy

    def take(self, policy: Policy) -> bool:
        assert not self.closed
        self.policy = policy
        return self.rank > 0

    def __enter__(self) -> "Watched":
        self.closed = False
        started.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        assert not self.closed
        self.closed = True


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(engines.ENGINES, "fake", f"{__name__}:Watched")
    started.clear()
    yield
    assert all(engine.closed for engine in started)


@pytest.fixture
def settings(tiny_model: Path, chat: Chat) -> EngineSettings:
    return EngineSettings(resolve(str(tiny_model)), chat, "float32", 1.0, 8, 64, 4, 16)


@contextmanager
def step(settings: EngineSettings, workers: int = 1) -> Generator[Any]:
    """What a step does; its engine, or its pool of several workers."""
    with open_pool("fake", settings, Size(workers)) as pool:
        yield pool.engine if isinstance(pool, Inline) else pool


def test_without_a_shelf_every_step_has_its_engine(
    settings: EngineSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with step(settings) as engine:
            assert not engine.closed
        assert engine.closed
    assert len(started) == 2
    assert capsys.readouterr().err.count("starting engine fake (tiny, float32)") == 2


def test_the_same_settings_take_the_engine_of_the_step_before(settings: EngineSettings, tiny_model: Path) -> None:
    with warm.shelf() as shelf:
        shelf.keep = True
        with step(settings):
            pass
        shelf.keep = False
        with step(replace(settings, chat=load_chat(tiny_model))) as engine:  # read again, and equal
            assert engine is started[0]
            assert not started[0].closed
        assert started[0].closed  # nothing is to come: its memory is free for what follows in this step
        with step(settings):
            pass
    assert len(started) == 2


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"max_tokens": 9}, {"max_model_len": 65}, {"stop_token_ids": (5,)}, {"top_k": 3}]
)
def test_another_engine_closes_the_one_on_the_shelf_first(settings: EngineSettings, change: dict[str, Any]) -> None:
    with warm.shelf() as shelf:
        shelf.keep = True
        with step(settings):
            pass
        assert not started[0].closed
        with step(replace(settings, **change)):
            assert started[0].closed
    assert len(started) == 2


def test_another_policy_is_another_engine(settings: EngineSettings, other_model: Path) -> None:
    with warm.shelf() as shelf:
        shelf.keep = True
        for model in (settings.policy, resolve(str(other_model))):
            with step(replace(settings, policy=model)):
                pass
    assert len(started) == 2


@pytest.mark.parametrize("rank", [0, 8])
def test_another_adapter_is_taken_by_the_engine_that_runs_where_it_can(settings: EngineSettings, rank: int) -> None:
    """Every step asks with no rank; the shelf knows what later steps bring."""
    adapted = replace(settings.policy, adapter=Path("a"), adapter_weights="00")
    with warm.shelf(lora_rank=rank) as shelf:
        shelf.keep = True
        for policy in (settings.policy, adapted, adapted, settings.policy):
            with step(replace(settings, policy=policy)) as engine:
                assert isinstance(engine, Watched)
                assert engine.policy == policy
    assert len(started) == (1 if rank else 3)


def test_an_engine_that_fails_to_take_an_adapter_is_closed(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> bool:
        raise DataError("damaged", "")

    monkeypatch.setattr(Watched, "take", fails)
    with warm.shelf(lora_rank=8) as shelf:
        shelf.keep = True
        with step(settings):
            pass
        adapted = replace(settings.policy, adapter_weights="00")
        with pytest.raises(DataError), step(replace(settings, policy=adapted)):
            pass
        assert started[0].closed


def test_an_engine_whose_step_failed_is_not_kept(settings: EngineSettings) -> None:
    with warm.shelf() as shelf:
        shelf.keep = True
        with pytest.raises(RuntimeError, match="x"), step(settings):
            raise RuntimeError("x")
        assert started[0].closed
        with step(settings):
            pass
    assert len(started) == 2
