"""Missing reference log-probs, made from the initial policy before step 0 and kept as a cache in the run."""

from collections.abc import Sequence
from typing import TypeVar

from prefpipe import log
from prefpipe.forward.logps import TreeModel, score
from prefpipe.ids import ids_digest
from prefpipe.schemas import RefLogps, from_table, to_table
from prefpipe.store import Run
from prefpipe.train.groups import tree_of
from prefpipe.train.parallel import World
from prefpipe.train.rows import TokenLogps, TrainRow, has_references

R = TypeVar("R", bound=TrainRow)


def values_for(
    run_: Run | None, world: World, rows: Sequence[TrainRow], model: TreeModel, scorer: str, reference: str
) -> dict[str, TokenLogps]:  # fmt: skip
    """Values by completion id for every row that lacks some: scored once, on all ranks, and then read from the run.

    `run_` is the output directory, held by rank 0 only. The caller sees to it that `model` is the reference.
    """
    missing = [row for row in rows if not has_references(row)]
    if not missing:
        return {}
    if not world.tell(run_.has_part("ref_logps", 0) if run_ else False):
        log.info(f"{len(missing)} of {len(rows)} rows have no reference log-probs: they are scored once, now")
        made = _score(missing[world.rank :: world.size], model, scorer, reference)
        found = {r.completion_id: r for share in world.gather(made) for r in share}
        if run_:
            run_.write_part("ref_logps", RefLogps, 0, to_table(RefLogps, [found[key] for key in sorted(found)]))
    return world.tell(_cached(run_))


def filled(rows: Sequence[R], values: dict[str, TokenLogps]) -> list[R]:
    """Rows with the values in place of missing ones."""
    return [row if has_references(row) else row.with_references(values) for row in rows]


def _cached(run_: Run | None) -> dict[str, TokenLogps]:
    if run_ is None:
        return {}
    rows = from_table(RefLogps, run_.read_part("ref_logps", RefLogps, 0))
    return {r.completion_id: tuple(r.token_logps) for r in rows}


def _score(rows: Sequence[TrainRow], model: TreeModel, scorer: str, reference: str) -> list[RefLogps]:
    """This rank's share, prompts together, so that each is computed once."""
    found: dict[str, RefLogps] = {}
    ordered = sorted(rows, key=lambda row: row.prompt)
    with log.progress("reference log-probs", len(rows), "rows") as advance:
        for row, values in zip(ordered, score(model, map(tree_of, ordered)), strict=True):
            for answer, logps in zip(row.answers, values, strict=True):
                digest = ids_digest(row.prompt, answer.ids)
                found[answer.completion_id] = RefLogps(
                    answer.completion_id, reference, scorer, digest, logps, sum(logps), len(logps)
                )
            advance(1)
    return list(found.values())
