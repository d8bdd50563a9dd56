"""Ends of real worker processes and of their driver: nothing is lost, and nothing is left running."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forge import Ended, Forge
from tests.inference.birds import contents, write_prompts
from tests.waiting import PATIENCE_S, until


def arguments(model: Path, prompts: Path, out: Path, workers: int) -> list[object]:
    return ["generate", "--model", model, "--prompts", prompts, "--engine", "fake", "--num-samples", 2,
            "--rewards", "short_sentence", "--shard-rows", 4, "--workers", workers, "--out", out]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl")


@pytest.fixture(scope="module")
def expected(
    forged: Forge, tiny_model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("inline") / "g"
    assert forged.run(*arguments(tiny_model, prompts, out, 1)).code == 0
    return contents(out)


def workers_of(driver: int) -> list[int]:
    """The worker processes that a driver has started, by their command line, which names it."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if b"prefpipe.inference.pool_worker" in words and words[-2] == str(driver).encode():
            found.append(int(entry.name))
    return found


def disturbed(forged: Forge, command: list[object], out: Path, disturb: Callable[[int], None]) -> Ended:
    """A run that is disturbed, given its process id, while both workers are at work: each has made a shard."""
    held, ended = out.parent / "held", list[Ended]()
    held.mkdir()
    job = {"engine": "tests.faults.engines:held", "env": {"HELD_IN": str(held)}}
    running = threading.Thread(target=lambda: ended.append(forged.run(*command, **job)))
    running.start()
    until(lambda: len(list(held.iterdir())) == 2 and list((out / "completions").glob("*.ok.json")))
    pid = int((out / ".owner").read_text().split()[1])
    assert {str(worker) for worker in workers_of(pid)} == {path.name for path in held.iterdir()}
    disturb(pid)
    (held / "go").touch()
    running.join(PATIENCE_S)
    assert until(lambda: not workers_of(pid))
    return ended[0]


def test_a_killed_worker_costs_its_shards_and_nothing_else(
    forged: Forge, tiny_model: Path, prompts: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "g"
    command = arguments(tiny_model, prompts, out, 2)
    done = disturbed(forged, command, out, lambda pid: os.kill(workers_of(pid)[0], signal.SIGKILL))
    assert done.code == 0, done.stderr
    assert "ended (SIGKILL)" in done.stderr
    assert contents(out) == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_when_the_driver_ends_its_workers_end_and_one_process_goes_on(
    forged: Forge, tiny_model: Path, prompts: Path, expected: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "g"
    done = disturbed(forged, arguments(tiny_model, prompts, out, 2), out, lambda pid: os.kill(pid, number))
    assert done.code == (-9 if number == signal.SIGKILL else 128 + number), done.stderr
    assert not (out / "manifest.json").exists()
    again = forged.run(*arguments(tiny_model, prompts, out, 1))
    assert again.code == 0, again.stderr
    assert contents(out) == expected
