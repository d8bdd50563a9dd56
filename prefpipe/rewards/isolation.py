"""Calls in processes that may hang or die: a completion that breaks its checker costs its row, never the run."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from prefpipe.processes import environment, module_path, python

Process = subprocess.Popen[bytes]
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """The end of a call: a value with status ok, or no value with status timeout or crash and the reason."""

    value: Any
    status: str
    detail: str | None


def num_cores(num_workers: int) -> int:
    """The number of processes for the setting `num_workers`: 0 means one for each core that this process may use."""
    return num_workers or len(os.sched_getaffinity(0))


def isolated(
    function: str, *, timeout_seconds: float, num_workers: int, imports: Sequence[str] = ()
) -> Callable[[Sequence[Sequence[Any]]], list[Outcome]]:
    """A function that calls `module:function` once for each list of arguments (JSON values), several at once.

    It returns the outcomes in the order of the arguments. Each call runs in a fork of a process that has imported the
    module and `imports` already, so that imports do not count against `timeout_seconds`. Any thread may use it, one at
    a time. The processes start at the first use. They end when the function is garbage, or with this process, however
    that ends.
    """
    processes: list[Process] = []
    start = functools.partial(_start, function, timeout_seconds, imports)

    def call_all(arguments: Sequence[Sequence[Any]]) -> list[Outcome]:
        while len(processes) < min(num_cores(num_workers), len(arguments)):
            processes.append(start())
        return _calls(start, processes, arguments) if arguments else []

    weakref.finalize(call_all, _close, processes)
    return call_all


def _calls(start: Callable[[], Process], processes: list[Process], arguments: Sequence[Sequence[Any]]) -> list[Outcome]:
    """The outcomes of calls. A thread for each process sends it one call after the other."""
    outcomes: dict[int, Outcome] = {}
    waiting = iter(range(len(arguments)))  # shared by the threads: next() of a range is atomic
    stopping = threading.Event()

    def work(number: int) -> None:
        for index in waiting:
            outcome = _ask(processes[number], arguments[index])
            if stopping.is_set():
                return
            if outcome is None:
                _close([processes[number]])
                processes[number] = start()
                outcome = Outcome(None, "crash", "the process of the checker died")
            outcomes[index] = outcome

    with ThreadPoolExecutor(len(processes)) as pool:
        try:
            for done in [pool.submit(work, number) for number in range(len(processes))]:
                done.result()
        except BaseException:
            stopping.set()
            for process in processes:  # no thread may wait for a process any more
                kill(process)
            pool.shutdown()
            _close(processes)
            processes.clear()
            raise
    return [outcomes[index] for index in range(len(arguments))]


def _start(function: str, timeout_seconds: float, imports: Sequence[str]) -> Process:
    """Start a worker in a session of its own: Ctrl-C reaches this process only, which ends its workers."""
    return subprocess.Popen(
        python("prefpipe.rewards.worker", function, str(timeout_seconds), *imports),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**environment(module_path()), **_ONE_THREAD},
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
    try:
        return Outcome(**json.loads(line)) if line else None
    except (ValueError, TypeError, RecursionError):
        return Outcome(None, "crash", "the checker's answer cannot be read")


def kill(process: Process) -> None:
    """Kill a process that leads a session, and every process in it. Does not wait for them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _close(processes: list[Process]) -> None:
    for process in processes:
        kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # closing flushes to a reader that is dead
                if pipe is not None:
                    pipe.close()
