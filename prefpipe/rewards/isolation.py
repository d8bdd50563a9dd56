"""Checkers that may hang or die run in processes of their own: a bad completion costs its row, never the run."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

Process = subprocess.Popen[bytes]
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """What became of a call: its value with status ok; or status timeout or crash, with the reason."""

    value: Any
    status: str
    detail: str | None


def num_cores(num_workers: int) -> int:
    """The setting `num_workers`: 0 stands for the cores that this process may use."""
    return num_workers or len(os.sched_getaffinity(0))


def isolated(
    function: str, *, timeout_seconds: float, num_workers: int, imports: Sequence[str] = ()
) -> Callable[[Sequence[Sequence[Any]]], list[Outcome]]:
    """Calls of `module:function`, several at once, each in a fork of a process that has imported the module and the
    further `imports`, which so take no call's time.

    The result takes a list of argument lists (JSON values) and gives their outcomes in the same order. It may be called
    from any thread, but by one at a time. The processes start at its first call and end with it, or with this process
    however that ends.
    """
    processes: list[Process] = []
    start = functools.partial(_start, function, timeout_seconds, imports)

    def call_all(arguments: Sequence[Sequence[Any]]) -> list[Outcome]:
        while len(processes) < min(num_cores(num_workers), len(arguments)):
            processes.append(start())
        return _Calls(start, processes, arguments).run()

    weakref.finalize(call_all, _close, processes)
    return call_all


class _Calls:
    """One list of calls under way: a thread for every process hands it one call after the other."""

    def __init__(
        self, start: Callable[[], Process], processes: list[Process], arguments: Sequence[Sequence[Any]]
    ) -> None:
        self._start = start
        self._processes = processes
        self._arguments = arguments
        self._outcomes: dict[int, Outcome] = {}
        self._waiting = iter(range(len(arguments)))  # shared by the threads: next() of a range is atomic
        self._stopping = threading.Event()

    def run(self) -> list[Outcome]:
        if not self._arguments:
            return []
        with ThreadPoolExecutor(len(self._processes)) as pool:
            try:
                for done in [pool.submit(self._work, number) for number in range(len(self._processes))]:
                    done.result()
            except BaseException:
                self._stopping.set()
                for process in self._processes:  # what the threads wait for ends
                    _kill(process)
                pool.shutdown()
                _close(self._processes)
                self._processes.clear()
                raise
        return [self._outcomes[index] for index in range(len(self._arguments))]

    def _work(self, number: int) -> None:
        for index in self._waiting:
            outcome = _ask(self._processes[number], self._arguments[index])
            if self._stopping.is_set():
                return
            if outcome is None:
                _close([self._processes[number]])
                self._processes[number] = self._start()
                outcome = Outcome(None, "crash", "the process of the checker died")
            self._outcomes[index] = outcome


def _start(function: str, timeout_seconds: float, imports: Sequence[str]) -> Process:
    """In a session of its own: Ctrl-C is for us, and we end it."""
    return subprocess.Popen(
        [sys.executable, "-m", "prefpipe.rewards.worker", function, str(timeout_seconds), *imports],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        start_new_session=True,
    )


def _ask(process: Process, arguments: Sequence[Any]) -> Outcome | None:
    """The outcome of one call, or None when the process is gone."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(list(arguments)).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:
        return None
    return Outcome(**json.loads(line)) if line else None


def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with its forks


def _close(processes: list[Process]) -> None:
    for process in processes:
        _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was still to be written
                if pipe is not None:
                    pipe.close()
