"""Log-probs of sequences by a policy, kept beside the answers: scored once, a shard at a time."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain

from prefpipe import log
from prefpipe.engines.base import ScoreRequest
from prefpipe.inference import scoring
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.pool import Pool
from prefpipe.inference.works import Part, Scoring, part_of, write
from prefpipe.runs import fsio
from prefpipe.runs.store import NO_ROWS, Run
from prefpipe.schemas import RefLogps


def fill(
    run: Run,
    dataset: str,
    sequences: Iterable[tuple[int, Sequence[ScoreRequest]]],
    start: Callable[[], Pool],
    *,
    reference: str,
    adapter: bool,
    rows_of: Callable[[int], Mapping[str, str]] = lambda _index: NO_ROWS,
) -> None:
    """Score and commit the missing shards of a dataset of log-probs, given as (index, sequences) in rising order; no
    engine starts for none. `reference` is the id of the policy that scores; `rows_of` gives the digests of a shard.

    A sequence that killed the engine twice is left out.
    """
    source = iter(sequences)
    first = next(source, None)
    if first is None:
        return
    folder = run.out / dataset
    fsio.make_dirs(folder)
    inflight = Inflight.load(folder)
    shards = ((index, (list(requests), rows_of(index))) for index, requests in chain([first], source))
    work = Scoring(_without, _requests, partial(_parts, dataset, reference), adapter=adapter)
    pool = start()
    with log.progress("scoring", None, "sequences") as advance:
        for whole in pool.run(work, shards, inflight, advance, scoring.last_suspect(inflight)):
            write(run, whole)
    inflight.close()


_Content = tuple[list[ScoreRequest], Mapping[str, str]]  # the sequences of a shard, and the digests of its rows


def _without(content: _Content, killers: Collection[str]) -> _Content:
    requests, rows = content
    return [request for request in requests if request.completion_id not in killers], rows


def _requests(content: _Content) -> list[ScoreRequest]:
    return content[0]


def _parts(
    dataset: str, reference: str, _index: int, content: _Content, values: scoring.Values, scorer: str
) -> list[Part]:
    requests, digests = content
    rows = scoring.rows_of(requests, values, reference, scorer)
    return [part_of(dataset, RefLogps, rows, digests)]
