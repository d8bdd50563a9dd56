"""Completions to an engine, shard by shard: log-probs by completion_id, though a completion may stand in two shards."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from prefpipe.engines.base import Request, ScoreRequest
from prefpipe.errors import PrefpipeError
from prefpipe.inference import scoring
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.scoring import Values
from prefpipe.inference.shards import Shard
from prefpipe.schemas import Completion
from tests.engines.cases import ScriptedEngine


def scorer(poison: str = "") -> ScriptedEngine:
    """Takes three requests before it answers one, as -token for every token; fails as soon as it gets `poison`."""

    def admit(work: Request | ScoreRequest) -> bool:
        if isinstance(work, ScoreRequest) and work.completion_id == poison:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return True

    def value(request: ScoreRequest, adapter: bool) -> list[float]:
        assert adapter
        return [-float(t) for t in request.token_ids]

    return ScriptedEngine(lambda _: [], value, admit)


def shards(*sizes: int) -> list[Shard[int, ScoreRequest]]:
    """Every shard has the ids c0, c1, ...; the values that belong to (shard, place) are its own."""
    return [
        scoring.shard_of(index, index, [ScoreRequest(f"c{i}", [9], [index, i]) for i in range(size)])
        for index, size in enumerate(sizes)
    ]


def score(of: Iterable[Shard[int, ScoreRequest]], engine: ScriptedEngine, out: Path) -> list[tuple[int, Values]]:
    inflight = Inflight.load(out)
    with inflight.recording():
        last = scoring.last_suspect(inflight)
        return list(scoring.score_shards(of, engine, inflight, lambda amount, note="": None, last_suspect=last))


def test_the_same_completion_in_two_shards_is_scored_for_each(tmp_path: Path) -> None:
    found = score(shards(2, 0, 3), scorer(), tmp_path)
    assert dict(found) == {0: {"c0": [0, 0], "c1": [0, -1]}, 1: {}, 2: {"c0": [-2, 0], "c1": [-2, -1], "c2": [-2, -2]}}
    assert len(found) == 3


def test_a_completion_that_kills_the_engine_twice_is_known_by_its_id(tmp_path: Path) -> None:
    """First death: three were inside. Second: they run alone, so the one that kills is known."""
    for count in (3, 1):
        with pytest.raises(PrefpipeError, match=f"the engine died while it worked on {count} completions") as caught:
            score(shards(2, 4, 2), scorer(poison="1/c2"), tmp_path)
        assert "these completions run first, one at a time" in caught.value.hint
    assert list(map(scoring.completion_of, Inflight.load(tmp_path).killers)) == ["c2"]


def test_suspects_run_alone_and_first_with_the_shards_up_to_theirs(tmp_path: Path) -> None:
    (tmp_path / "inflight.log").write_text("start\ntake 1/c1\ntake 1/c2\ntake 0/c9\n")  # 0/c9 is done meanwhile
    engine = scorer()
    assert [index for index, _ in score(iter(shards(2, 3, 2)), engine, tmp_path)] == [0, 1, 2]
    assert engine.entered == [["1/c1"], ["1/c2"], ["0/c0", "0/c1", "1/c0", "2/c0", "2/c1"]]


def test_a_request_has_the_ids_of_its_completion() -> None:
    completion = Completion("c", "p", 0, "text", [1, 2], [3], "stop", "policy", "digest")
    assert scoring.request_of(completion) == ScoreRequest("c", [1, 2], [3])
