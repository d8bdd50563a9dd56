"""Work on partitions in this process or in several: results come back in the order of the partitions."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa

from prefpipe import processes
from prefpipe.errors import PrefpipeError

R = TypeVar("R")


# The builtin `map`, or one whose function, of a module, runs in other processes.
Map = Callable[..., Iterator[Any]]


@contextmanager
def tasks(workers: int) -> Generator[Map]:
    """A `map` over `workers` processes; with one worker the builtin `map`. The cores are divided among the processes.

    The processes end with the block, and with this process however it ends. The `map` raises what its function raises,
    and PrefpipeError when a process dies.
    """
    if workers == 1:
        yield map
        return
    threads = str(max(1, len(os.sched_getaffinity(0)) // workers))
    named = os.environ.get("POLARS_MAX_THREADS")
    os.environ["POLARS_MAX_THREADS"] = named or threads  # a process reads it when it starts
    others = {*multiprocessing.active_children()}
    context = multiprocessing.get_context("spawn")  # the threads of polars do not survive a fork
    pool = ProcessPoolExecutor(workers, context, _begin, (os.getpid(), int(threads)))
    try:
        yield partial(_map, pool)
    except BaseException:
        for process in {*multiprocessing.active_children()} - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if named is None:
            del os.environ["POLARS_MAX_THREADS"]


def _map(pool: ProcessPoolExecutor, function: Callable[..., R], *arguments: Iterable[Any]) -> Iterator[R]:
    try:
        yield from pool.map(function, *arguments)
    except BrokenProcessPool as error:
        raise PrefpipeError(
            "a worker of build-pairs died, which usually means that the memory is full",
            "run the same command again with fewer --workers",
        ) from error


def _begin(parent: int, threads: int) -> None:
    """Leave the signals of a terminal to the parent process, which ends its workers, and end with the parent."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    processes.death_with_parent(signal.SIGKILL, parent)()
    pa.set_cpu_count(threads)
