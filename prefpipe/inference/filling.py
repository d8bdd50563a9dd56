"""The sampling that `generate` and `evaluate` share: prompts through engines into shards, each committed once."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from prefpipe import clock, log
from prefpipe.config.engine import SamplingConfig
from prefpipe.engines.base import Engine
from prefpipe.errors import DataError, RowFault
from prefpipe.inference import sampling, warm
from prefpipe.inference.cutting import shards_of
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.pool import Pool, open_pool
from prefpipe.inference.pool_size import Needs, size_of
from prefpipe.inference.sampling import Draws, Encode, PromptShard, SampledShard
from prefpipe.inference.task import Task, encoder, engine_settings, gather_ledger, longest_sequence
from prefpipe.inference.works import Part, Sampling, write
from prefpipe.inputs import files
from prefpipe.inputs.prompts import Prompts
from prefpipe.rows import what_helps, why_dropped
from prefpipe.runs import fsio
from prefpipe.runs.store import Run
from prefpipe.schemas import Dropped, to_table

Start = Callable[[int], Pool]  # number of shards -> engines for them, which start at the first call
Finish = Callable[[SampledShard, Engine], list[Part]]  # whole shard -> its parts; the engine still runs


def run_shards(
    run: Run, task: Task, config: SamplingConfig, datasets: Sequence[str], draws: Draws, finish: Finish
) -> int:
    """Sample and commit every shard that lacks one of `datasets`, then write the ledger. Returns the number of shards
    of the run."""
    with engines_on_demand(task, config) as start:
        count = sample_missing(run, task, config, datasets, draws, finish, start)
    gather_ledger(run, len(task.prompts), task.repeated)
    return count


@contextmanager
def engines_on_demand(task: Task, config: SamplingConfig) -> Generator[Start]:
    """A function that starts the engines at its first call. They end with the block."""
    settings = engine_settings(task, config, longest_sequence(task, config))
    started: list[Pool] = []
    with ExitStack() as stack:

        def start(shards: int) -> Pool:
            if not started:
                cache, kept = config.kv_cache_mib << 20, warm.has_shelf()
                needs = Needs(shards, config.tensor_parallel_size, cache, config.dtype, kept)
                size = size_of(config.workers, config.cluster, config.engine, task.policy, needs)
                started.append(stack.enter_context(open_pool(config.engine, settings, size)))
            return started[0]

        yield start


def sample_missing(
    run: Run,
    task: Task,
    config: SamplingConfig,
    datasets: Sequence[str],
    draws: Draws,
    finish: Finish,
    start: Start,
    folder: str = "",
) -> int:
    """Sample and commit every shard that lacks one of `datasets`. Returns the number of shards of the task.

    `folder` inside the run holds the record of requests in the engine. A run of several tasks needs one folder for
    each.
    """
    fsio.make_dirs(run.out / folder)
    inflight = Inflight.load(run.out / folder)
    rows, shards = shards_of(task.prompts, run.saved)
    missing = {*shards} - _committed(run, task.prompts, datasets)

    def read() -> Iterator[PromptShard]:
        return sampling.cut(task.prompts.places(), rows, missing)

    if missing:
        if len(missing) == len(shards):
            _check_any(run, read(), encoder(task, config, inflight.killers))
        began = clock.monotonic()
        expected = sum(min(rows, task.prompts.num_places - index * rows) for index in missing)
        work = Sampling(partial(encoder, task.portable(), config), draws, finish, task.chat)
        last = sampling.last_suspect(read(), inflight.suspects)
        tokens = 0
        pool = start(len(missing))
        with log.progress("sampling", expected, "prompts") as advance:
            for whole in pool.run(work, read(), inflight, advance, last):
                tokens += write(run, whole)
        run.log_timing(event="sampled", tokens=tokens, seconds=round(clock.monotonic() - began, 3))
    for name in datasets:
        run.set_aside_from(name, len(shards))
    if files.state([task.source]) != task.read_state:
        raise files.changed(task.source)
    inflight.close()
    return len(shards)


def _committed(run: Run, prompts: Prompts, datasets: Sequence[str]) -> set[int]:
    """The shards that have all `datasets`, made of the prompts that are in the file now."""
    rows, shards = shards_of(prompts, run.saved)
    started = {index for name in datasets for index in run.parts(name)} & {*shards}
    found = sampling.cut(prompts.places() if started else [], rows, started)
    return {index for index, shard in found if run.has_shard(datasets, index, sampling.rows_of(shard))}


def _check_any(run: Run, shards: Iterable[PromptShard], encode: Encode) -> None:
    """Raise DataError when no prompt can be sampled, before an engine starts in vain. The search ends at the first
    prompt that can be sampled; the ledger has the reasons of the others."""
    dropped: list[Dropped] = []
    for prompt in (p for _, prompts in shards for p in prompts):
        try:
            encode(prompt)
        except RowFault as fault:
            dropped.append(Dropped(prompt.prompt_id, fault.reason, fault.detail))
        else:
            return
    run.write_dropped(Dropped, to_table(Dropped, dropped))
    hint = what_helps(dropped) or f"see {run.out}/dropped.parquet for every prompt"
    raise DataError(f"no prompt is left: {why_dropped(dropped)}", hint)
