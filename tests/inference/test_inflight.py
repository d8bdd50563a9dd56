"""The record of what the engine was working on: who is suspected, who is convicted, and who never is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefpipe.errors import DataError, PrefpipeError
from prefpipe.inference.inflight import Inflight


def log(out: Path, *lines: str, torn: str = "") -> Inflight:
    (out / "inflight.log").write_text("".join(f"{line}\n" for line in lines) + torn)
    return Inflight.load(out)


CASES = {
    "nothing happened": ([], [], []),
    "all done, then killed": (["start", "take a", "done a"], [], []),
    "killed with two inside": (["start", "take a", "take b", "take c", "done b"], ["a", "c"], []),
    "engine failed with two inside": (["start", "take a", "take b", "died", "stopped"], ["a", "b"], []),
    "stopped by Ctrl-C": (["start", "take a", "stopped"], [], []),
    "alone, engine failed": (["start", "take a", "died", "stopped", "start", "alone a", "died"], [], ["a"]),
    "alone, killed once": (["start", "take a", "start", "alone a"], ["a"], []),
    "alone, killed twice": (["start", "take a", "start", "alone a", "start", "alone a"], [], ["a"]),
    "alone, killed, then fine": (["start", "alone a", "start", "alone a", "done a"], ["a"], []),
    "alone, stopped twice": (["start", "alone a", "stopped", "start", "alone a", "stopped"], [], []),
    "never alone, killed often": (["start", "take a"] * 5, ["a"], []),
    "a worker vanished with two inside": (["start", "take a", "take b", "vanished a", "done b"], ["a"], []),
    "alone in a worker that vanished": (["start", "alone a", "vanished a", "stopped"], ["a"], []),
    "alone in two workers that vanished": (["start", "alone a", "vanished a", "alone a", "vanished a"], [], ["a"]),
    "alone in a worker whose engine failed": (["start", "alone a", "failed a"], [], ["a"]),
    "a worker vanished, then the driver": (["start", "alone a", "vanished a", "alone a", "take b"], ["b"], ["a"]),
    "convicted long ago": (["killer a"], [], ["a"]),
}


@pytest.mark.parametrize("case", CASES)
def test_who_is_suspected_and_who_is_convicted(tmp_path: Path, case: str) -> None:
    lines, suspects, killers = CASES[case]
    found = log(tmp_path, *lines)
    assert (found.suspects, found.killers) == (suspects, killers)


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    assert log(tmp_path, "start", "take abc", torn="take ab").suspects == ["abc"]


def test_what_is_recorded_is_read_back(tmp_path: Path) -> None:
    first = Inflight.load(tmp_path)
    with pytest.raises(KeyboardInterrupt), first.recording():  # noqa: PT012  (what happens inside is the point)
        first.take("a", alone=False)
        first.take("b", alone=False)
        first.done("a")
        assert Inflight.load(tmp_path).suspects == ["b"]  # as if the process were gone here
        raise KeyboardInterrupt
    assert Inflight.load(tmp_path).suspects == []
    second = Inflight.load(tmp_path)
    with second.recording():
        second.take("b", alone=True)
        second.died()
    third = Inflight.load(tmp_path)
    assert third.killers == ["b"]
    third.close()
    assert Inflight.load(tmp_path).killers == ["b"]


def test_what_is_known_of_workers_at_once_is_what_the_log_says_later(tmp_path: Path) -> None:
    """Two prompts in a worker that vanishes, then each alone in another one: the second dies with its prompt, twice."""
    now = Inflight.load(tmp_path)
    with now.recording():
        for deaths in (["a", "b"], ["b"], ["b"]):
            for key in deaths:
                now.take(key, alone=len(deaths) == 1)
            assert now.lost(deaths, "vanished") == (["b"] if now.killers else [])
            later = Inflight.load(tmp_path)
            assert (now.suspects, now.killers) == (later.suspects, later.killers)
    assert (now.suspects, now.killers) == (["a"], ["b"])
    assert not now.inside


def failing(error: Exception) -> Iterator[int]:
    yield 1
    raise error


def test_an_engine_that_fails_is_recorded_an_error_of_ours_is_not(tmp_path: Path) -> None:
    """With "a" inside: suspected when the engine fails, cleared when an error of the run's own goes through it."""
    for error, expected, suspects in (
        (RuntimeError("CUDA error"), "the engine died while it worked on 1 rows: RuntimeError: CUDA error", ["a"]),
        (DataError("bad row", "fix it"), "bad row", []),
    ):
        (tmp_path / "inflight.log").unlink(missing_ok=True)
        run, seen = Inflight.load(tmp_path), list[int]()
        with pytest.raises(PrefpipeError, match=expected), run.recording():  # noqa: PT012  (what comes before counts)
            run.take("a", alone=False)
            for result in run.watch(failing(error), "rows"):
                seen.append(result)
        assert seen == [1]
        assert Inflight.load(tmp_path).suspects == suspects


def test_what_goes_wrong_with_a_result_is_no_death_of_the_engine(tmp_path: Path) -> None:
    run = Inflight.load(tmp_path)
    with pytest.raises(ZeroDivisionError), run.recording():  # noqa: PT012
        run.take("a", alone=False)
        for _ in run.watch(iter([1, 2]), "rows"):
            raise ZeroDivisionError
    assert Inflight.load(tmp_path).suspects == []


def test_a_whole_run_leaves_no_record(tmp_path: Path) -> None:
    run = Inflight.load(tmp_path)
    with run.recording():
        run.take("a", alone=False)
        run.done("a")
    run.close()
    assert not (tmp_path / "inflight.log").exists()


@given(st.lists(st.sampled_from(["start", "stopped", "take a", "take b", "done a", "done b"]), max_size=20))
def test_nobody_is_convicted_without_having_been_alone(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    assert log(tmp_path_factory.mktemp("log"), *lines).killers == []
