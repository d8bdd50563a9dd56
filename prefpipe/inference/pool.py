"""Shards to workers and back: one engine in this process, or several in others.

    with open_pool(name, settings, size) as pool:
        for whole in pool.run(work, shards, inflight, advance):
            ...  # the driver, which alone holds the run, commits these shards

Several workers are driven by `pool_driver`.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from prefpipe import engines, log
from prefpipe.engines.base import Engine, EngineSettings
from prefpipe.inference import warm
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.pool_driver import Backend, Shards, Workers
from prefpipe.inference.pool_messages import Hello
from prefpipe.inference.pool_processes import Processes
from prefpipe.inference.pool_size import Size, environments
from prefpipe.inference.works import Finished, Lease, Work
from prefpipe.log import Advance
from prefpipe.models.policy import Policy


class Pool(Protocol):
    """Workers, one or several, with an engine each."""

    def run(
        self, work: Work, shards: Shards, inflight: Inflight, advance: Advance, last_suspect: int = -1
    ) -> Iterator[Sequence[Finished]]:
        """Every shard when it is whole, in any order; those that are whole at the same time come together.
        `last_suspect` is the number of the last shard with a suspect of `inflight` (-1 for none): shards up to it are
        read at once. Raises PrefpipeError when work fails."""
        ...


@contextmanager
def open_pool(name: str, settings: EngineSettings | None, size: Size) -> Generator[Pool]:
    """Workers for the length of a `with` block; `settings` None for work that needs no engine. Those of the step before
    serve, where it has left them (see `warm`)."""
    several = bool(size.cluster) or size.workers > 1
    if settings is not None:
        kind = f"{name} on {size.cluster}" if size.cluster else name
        start = partial(_workers if several else _inline, name, size=size)
        with warm.engines(kind, settings, size.workers, start) as pool:
            yield pool
    elif several:
        with _workers(name, None, size=size) as pool:
            yield pool
    else:
        yield Inline(None)


@contextmanager
def _inline(name: str, settings: EngineSettings, *, size: Size) -> Generator["Inline | Workers"]:  # noqa: ARG001
    log.info(f"starting engine {name} ({settings.policy.directory.name}, {settings.dtype})")
    with engines.load(name, settings) as engine:
        yield Inline(engine)


@contextmanager
def _workers(name: str, settings: EngineSettings | None, *, size: Size) -> Generator["Inline | Workers"]:
    if size.cluster:
        from prefpipe.inference import pool_ray

        size = pool_ray.connect(size)
        backend: Backend = pool_ray.Cluster(size)
    else:
        backend = Processes(environments(size))
    log.info(f"starting {size.workers} workers with engine {name}{f' on {size.cluster}' if size.cluster else ''}")
    gently = False
    try:
        yield Workers(backend, Hello(name, engines.ENGINES[name], settings), size.workers)
        gently = True
    finally:
        backend.close(gently=gently)


@dataclass(frozen=True)
class Inline:
    """One engine in this process."""

    engine: Engine | None

    def run(
        self, work: Work, shards: Shards, inflight: Inflight, advance: Advance, last_suspect: int = -1
    ) -> Iterator[Sequence[Finished]]:
        """See `Pool`."""
        leases = (Lease(index, content, killers=tuple(inflight.killers)) for index, content in shards)
        with inflight.recording():
            # The engine is None for work that enters none.
            for shard in work.run(leases, self.engine, inflight, advance, last_suspect):  # type: ignore[arg-type]
                yield [shard]

    def take(self, policy: Policy) -> bool:
        """See `warm.Warm`."""
        return self.engine is not None and self.engine.take(policy)
