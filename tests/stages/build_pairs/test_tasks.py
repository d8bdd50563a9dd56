"""Tasks of build-pairs run in this process or in several, with the same results; nothing is left running."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefpipe.errors import DataError, PrefpipeError
from prefpipe.stages.build_pairs.tasks import tasks
from tests.forge import ROOT
from tests.waiting import PATIENCE_S, until


def double(number: int, other: int) -> tuple[int, int, str | None]:
    return 2 * number + other, os.getpid(), os.environ.get("POLARS_MAX_THREADS")


def fail(number: int) -> int:
    raise DataError(f"row {number} is odd", "mend it")


def die(_number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = {*multiprocessing.active_children()}
    yield
    assert {*multiprocessing.active_children()} <= before


def test_one_worker_is_this_process() -> None:
    with tasks(1) as run:
        assert [found[:2] for found in run(double, [1, 2], [3, 4])] == [(5, os.getpid()), (8, os.getpid())]


def test_results_of_processes_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLARS_MAX_THREADS", raising=False)
    with tasks(2) as run:
        found = [*run(double, range(6), range(6))]
    assert [value for value, *_ in found] == [0, 3, 6, 9, 12, 15]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for *_, threads in found} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert "POLARS_MAX_THREADS" not in os.environ


def test_an_error_of_a_worker_is_that_of_the_command() -> None:
    with pytest.raises(DataError, match="row 1 is odd") as caught, tasks(2) as run:
        [*run(fail, [1])]
    assert caught.value.hint == "mend it"


def test_a_worker_that_dies_is_an_error() -> None:
    with pytest.raises(PrefpipeError, match="a worker of build-pairs died"), tasks(2) as run:
        [*run(die, [1, 2, 3])]


def wait(place: Path) -> None:
    place.write_text(str(os.getpid()))
    time.sleep(600)


def hold(folder: Path) -> None:
    """Two workers at work; for the next test, in an interpreter of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
    with tasks(2) as run:
        [*run(wait, [folder / "0", folder / "1"])]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    script = f"from pathlib import Path\nfrom {__name__} import hold\nhold(Path({str(tmp_path)!r}))"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    places = [tmp_path / "0", tmp_path / "1"]
    until(lambda: all(place.is_file() and place.read_text() for place in places))
    workers = [int(place.read_text()) for place in places]
    parent.send_signal(number)
    assert parent.wait(PATIENCE_S) != 0
    until(lambda: not any(runs(worker) for worker in workers))


def runs(process: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
