# pyright: basic, reportMissingImports=false
# ray ships incomplete types.
"""A `map` whose function runs on the machines of a Ray cluster, which share the disk that it reads and writes.

Ray repeats nothing: a task that dies may have written half of its files, and the command that is run again makes them
all anew. Nothing here imports polars, whose number of threads is read once: a task sets it first.
"""

import os
import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prefpipe import log
from prefpipe.errors import IdentityError, PrefpipeError, UsageError
from prefpipe.inference import pool_ray
from prefpipe.inference.pool_messages import versions
from prefpipe.inference.pool_size import Size

_PACKAGES = ("polars", "rapidfuzz", "rensa")
_START_S = 60.0  # for a process on every machine
Identity = Callable[[], Mapping[str, str]]


@contextmanager
def tasks(cluster: str, folder: Path, identity: Identity) -> Generator[Callable[..., Iterator[Any]]]:
    """A `map` over the CPUs of a cluster; results come back in order. Tasks run in the working directory of this
    process, and end with it and with the block. `folder` must be there on every machine, and `identity`, a function of
    a module, must give the same everywhere.

    A map raises what its function raises, and PrefpipeError when a task dies. Raises UsageError for a cluster that is
    not there or does not see the folder, IdentityError for other versions or another identity.
    """
    size = pool_ray.connect(Size(0, cluster))
    try:
        _compare_machines(folder, identity)
        log.info(f"tasks run on {size.workers} CPUs of {cluster}")
        yield _map
    finally:
        ray.shutdown()


def _map(function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
    task = ray.remote(num_cpus=1, max_retries=0)(_run)
    here = str(Path.cwd())
    results = deque(task.remote(pickle.dumps((function, row)), here) for row in zip(*arguments, strict=False))
    while results:
        try:
            yield pickle.loads(ray.get(results.popleft()))  # noqa: S301  (from a task of this process)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise PrefpipeError(
                f"a task on the cluster died ({type(error).__name__}): memory may be full, or its machine is gone",
                "run the same command again",
            ) from error


def _run(work: bytes, here: str) -> bytes:
    """One call, in a process of Ray that has one CPU."""
    os.environ["POLARS_MAX_THREADS"] = "1"
    os.chdir(here)
    function, row = pickle.loads(work)  # noqa: S301  (from the command)
    return pickle.dumps(function(*row))


def _compare_machines(folder: Path, identity: Identity) -> None:
    """Raise UsageError for a machine without the folder, IdentityError for one that computes with something else."""
    expected = _computes(identity)
    work, here = pickle.dumps((_computes, (identity,))), str(Path.cwd())
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        name = f"{node['NodeManagerAddress']} of the cluster"
        place: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)  # ray's types know it not
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(_run_beside)
        try:
            answer = ray.get(task.remote(work, here, str(folder.absolute())), timeout=_START_S)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise UsageError(f"{name} starts no task: {type(error).__name__}", "see `ray status`") from error
        if answer is None:
            raise UsageError(
                f"{name} does not see {folder}",
                "put --out and all inputs on a disk that every machine has at the same path, or take --workers",
            )
        found = pickle.loads(answer)  # noqa: S301  (from a task of this process)
        for what in sorted(expected.keys() | found.keys()):
            if expected.get(what) != found.get(what):
                raise IdentityError(
                    f"{name} has {what} {found.get(what)}, the machine of the command {expected.get(what)}",
                    "install the same versions and files on every machine",
                )


def _run_beside(work: bytes, here: str, folder: str) -> bytes | None:
    """`_run` where folders are seen; None where not."""
    return _run(work, here) if Path(folder).is_dir() and Path(here).is_dir() else None


def _computes(identity: Identity) -> dict[str, str]:
    """What computes here, by name."""
    return {**versions(), **{name: metadata.version(name) for name in _PACKAGES}, **identity()}
