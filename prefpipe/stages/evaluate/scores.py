"""Log-probs of sequences by a policy, kept beside the answers: scored once, a shard at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from prefpipe import log
from prefpipe.engines.base import ScoreRequest
from prefpipe.ids import ids_digest
from prefpipe.inference import scoring
from prefpipe.inference.inflight import Inflight
from prefpipe.inference.shards import Shard
from prefpipe.inference.task import Start
from prefpipe.rows import ref_logps
from prefpipe.runs import fsio
from prefpipe.runs.store import NO_ROWS, Run
from prefpipe.schemas import RefLogps, to_table


def fill(
    run: Run,
    dataset: str,
    sequences: Iterable[tuple[int, Sequence[ScoreRequest]]],
    start: Start,
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
    killers = scoring.killers(inflight)

    def shards() -> Iterator[Shard[tuple[int, list[ScoreRequest]], ScoreRequest]]:
        for index, requests in chain([first], source):
            kept = [request for request in requests if request.completion_id not in killers]
            yield scoring.shard_of(index, (index, kept), kept)

    engine = start()
    with inflight.recording(), log.progress("scoring", None, "sequences") as advance:
        whole = scoring.score_shards(shards(), engine, inflight, advance, adapter=adapter)
        for (index, kept), values in whole:
            rows = [_row(request, values[request.completion_id], reference, engine.scorer) for request in kept]
            run.write_part(dataset, RefLogps, index, to_table(RefLogps, rows), rows_of(index))
    inflight.close()


def _row(request: ScoreRequest, logps: list[float], reference: str, scorer: str) -> RefLogps:
    digest = ids_digest(request.prompt_token_ids, request.token_ids)
    return ref_logps(request.completion_id, digest, logps, reference=reference, scorer=scorer)
