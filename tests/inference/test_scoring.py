"""Completions to an engine, shard by shard: whole ones with their own values, whatever order an engine finishes in."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefpipe.engines.base import Request, Sample, ScoreRequest
from prefpipe.errors import PrefpipeError
from prefpipe.inference import scoring
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.scoring import Scored, Shard
from tests.engines.cases import ScriptedEngine


def shuffled(seed: int = 0, in_flight: int = 3, poison: str = "", lost: str = "") -> ScriptedEngine:
    """Finishes in random order; fails as soon as it is given `poison`, loses `lost`. Values are minus the ids."""

    def admit(work: Request | ScoreRequest) -> bool:
        assert isinstance(work, ScoreRequest)
        if work.completion_id.endswith(poison or "nothing"):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return not work.completion_id.endswith(lost or "nothing")

    def sample(_: Request) -> list[Sample]:
        raise NotImplementedError

    def value(work: ScoreRequest, adapter: bool) -> list[float]:
        assert adapter
        return [-float(t) for t in work.token_ids]

    return ScriptedEngine(sample, value, admit, in_flight=in_flight, seed=seed)


def shards(*sizes: int) -> list[Shard]:
    """Every shard has the ids c0, c1, ...; the values that belong to (shard, place) are its own."""
    return [
        (index, [ScoreRequest(f"c{i}", [9], [index, i]) for i in range(size)]) for index, size in enumerate(sizes)
    ]  # fmt: skip


def expected(given_: list[Shard]) -> dict[int, dict[str, list[float]]]:
    return {index: {s.completion_id: [-float(t) for t in s.token_ids] for s in own} for index, own in given_}


def score(given_: Iterable[Shard], engine: ScriptedEngine, out: Path) -> list[Scored]:
    inflight = Inflight.load(out)
    with inflight.recording():
        return list(scoring.score_shards(given_, engine, inflight, None))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 4), max_size=6), st.integers(1, 9), st.integers(0, 1000))
def test_every_shard_comes_back_once_with_its_own_values(
    tmp_path: Path, sizes: list[int], in_flight: int, seed: int
) -> None:
    """The same ids stand in all shards; a shard may be empty."""
    given_ = shards(*sizes)
    found = score(given_, shuffled(seed, in_flight), tmp_path)
    assert len(found) == len(given_)
    assert dict(found) == expected(given_)


def test_shards_are_read_as_the_engine_needs_them(tmp_path: Path) -> None:
    """One sequence in flight: a shard comes back before the one after the next is read."""
    read: list[int] = []

    def reading() -> Iterator[Shard]:
        for shard in shards(2, 2, 2):
            read.append(shard[0])
            yield shard

    inflight = Inflight.load(tmp_path)
    with inflight.recording():
        so_far = [list(read) for _ in scoring.score_shards(reading(), shuffled(in_flight=1), inflight, None)]
    assert so_far == [[0], [0, 1], [0, 1, 2]]


def test_a_completion_that_kills_the_engine_twice_is_known_by_its_id(tmp_path: Path) -> None:
    """First death: three were inside. Second: they run alone, so the one that kills is known."""
    given_ = shards(2, 4, 2)
    for count in (3, 1):
        with pytest.raises(PrefpipeError, match=f"the engine died while it worked on {count} completions") as caught:
            score(given_, shuffled(poison="1/c2"), tmp_path)
        assert "these completions run first, one at a time" in caught.value.hint
    assert scoring.killers(Inflight.load(tmp_path)) == {"c2"}


def test_suspects_run_alone_and_first_the_others_once(tmp_path: Path) -> None:
    given_ = shards(2, 3, 2)
    (tmp_path / "inflight.log").write_text("start\ntake 1/c1\ntake 1/c2\ntake 0/c9\n")  # 0/c9 is done meanwhile
    engine = shuffled()
    assert dict(score(iter(given_), engine, tmp_path)) == expected(given_)
    assert engine.entered == [["1/c1"], ["1/c2"], ["0/c0", "0/c1", "1/c0", "2/c0", "2/c1"]]


def test_a_shard_of_suspects_comes_back_before_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "inflight.log").write_text("start\ntake 0/c0\n")
    engine = shuffled()
    inflight = Inflight.load(tmp_path)
    with inflight.recording():
        index, _ = next(iter(scoring.score_shards(shards(1, 5), engine, inflight, None)))
    assert (index, engine.entered) == (0, [["0/c0"]])


def test_a_sequence_without_values_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PrefpipeError, match="gave no log-probs for 2 completions"):
        score(shards(2, 2), shuffled(lost="c1"), tmp_path)
