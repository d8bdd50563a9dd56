"""Shards through an engine: whole ones with their own answers, whatever order the engine finishes in."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefpipe.errors import PrefpipeError
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.shards import Shard, through_engine

Found = list[tuple[str, dict[str, int]]]


class Doubling:
    """Answers a number with its double, in random order, working on up to `in_flight`; gives no answer to `lost`."""

    def __init__(self, seed: int = 0, in_flight: int = 3, lost: int | None = None) -> None:
        self._source = random.Random(seed)
        self._in_flight, self._lost = in_flight, lost
        self.calls: list[list[int]] = []

    def __call__(self, requests: Iterator[int]) -> Iterator[tuple[str, int]]:
        self.calls.append([])
        waiting: list[int] = []
        for request in requests:
            self.calls[-1].append(request)
            waiting += [] if request == self._lost else [request]
            if len(waiting) == self._in_flight:
                yield self._finish(waiting)
        while waiting:
            yield self._finish(waiting)

    def _finish(self, waiting: list[int]) -> tuple[str, int]:
        request = waiting.pop(self._source.randrange(len(waiting)))
        return f"k{request}", 2 * request


def shards(*sizes: int, first: int = 0) -> list[Shard[str, int]]:
    """Consecutive numbers, `sizes` to a shard; the keys are k0, k1, ..."""
    found: list[Shard[str, int]] = []
    for index, size in enumerate(sizes):
        found.append(Shard(index, f"shard {index}", {f"k{n}": n for n in range(first, first + size)}))
        first += size
    return found


def expected(of: list[Shard[str, int]]) -> dict[str, dict[str, int]]:
    return {shard.content: {key: 2 * n for key, n in shard.requests.items()} for shard in of}


def send(
    of: Iterator[Shard[str, int]] | list[Shard[str, int]],
    engine: Doubling,
    out: Path,
    last_suspect: int = -1,
    progress: list[float] | None = None,
) -> Iterator[tuple[str, dict[str, int]]]:
    inflight = Inflight.load(out)
    done = [] if progress is None else progress
    with inflight.recording():
        yield from through_engine(
            of, engine, inflight, lambda n, note="": done.append(n), last_suspect=last_suspect, things="numbers"
        )


@settings(deadline=None, max_examples=50, suppress_health_check=[*HealthCheck])
@given(st.lists(st.integers(0, 4), max_size=6), st.integers(1, 9), st.integers(0, 1000))
def test_every_shard_comes_back_once_with_its_own_answers(
    tmp_path: Path, sizes: list[int], in_flight: int, seed: int
) -> None:
    """A shard may be empty; progress counts every request once."""
    progress: list[float] = []
    found = list(send(shards(*sizes), Doubling(seed, in_flight), tmp_path, progress=progress))
    assert len(found) == len(sizes)
    assert dict(found) == expected(shards(*sizes))
    assert sum(progress) == sum(sizes)


def test_shards_are_read_as_the_engine_needs_them(tmp_path: Path) -> None:
    """One request in flight: a shard comes back before the one after it is read."""
    read: list[int] = []

    def reading() -> Iterator[Shard[str, int]]:
        for shard in shards(2, 2, 2):
            read.append(shard.index)
            yield shard

    so_far = [list(read) for _ in send(reading(), Doubling(in_flight=1), tmp_path)]
    assert so_far == [[0], [0, 1], [0, 1, 2]]


def test_suspects_run_alone_and_first_the_others_once(tmp_path: Path) -> None:
    (tmp_path / "inflight.log").write_text("start\ntake k3\ntake k4\ntake k99\n")  # k99 is done meanwhile
    engine = Doubling()
    found = dict(send(iter(shards(2, 3, 2)), engine, tmp_path, last_suspect=1))
    assert found == expected(shards(2, 3, 2))
    assert engine.calls == [[3], [4], [0, 1, 2, 5, 6]]


def test_a_shard_of_suspects_comes_back_before_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "inflight.log").write_text("start\ntake k0\n")
    engine = Doubling()
    content, _ = next(send(shards(1, 5), engine, tmp_path, last_suspect=0))
    assert (content, engine.calls) == ("shard 0", [[0]])


def test_a_request_without_an_answer_is_an_error(tmp_path: Path) -> None:
    """The shard that is whole comes back first."""
    found: Found = []
    with pytest.raises(PrefpipeError, match="the engine ended without an answer for 1 numbers"):
        found.extend(send(shards(2, 2), Doubling(in_flight=1, lost=3), tmp_path))
    assert found == [("shard 0", {"k0": 0, "k1": 2})]


def test_what_is_inside_when_the_engine_fails_is_under_suspicion(tmp_path: Path) -> None:
    def failing(requests: Iterator[int]) -> Iterator[tuple[str, int]]:
        yield f"k{next(requests)}", 0
        next(requests)
        next(requests)
        raise RuntimeError("CUDA error")

    inflight = Inflight.load(tmp_path)
    with pytest.raises(PrefpipeError, match="worked on 2 numbers: RuntimeError"), inflight.recording():
        list(through_engine(shards(4), failing, inflight, lambda n, note="": None, last_suspect=-1, things="numbers"))
    assert Inflight.load(tmp_path).suspects == ["k1", "k2"]
