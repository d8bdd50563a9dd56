"""Reference log-probs before step 0: missing ones are made by the reference and kept as a cache in the run, all are
audited by it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prefpipe import clock, log
from prefpipe.config.train import TrainConfig
from prefpipe.forward import load
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, score
from prefpipe.ids import ids_digest
from prefpipe.rows import logps_of_other_ids, one_reference, ref_logps
from prefpipe.runs import store
from prefpipe.runs.store import Run
from prefpipe.schemas import RefLogps, from_table, to_table
from prefpipe.stages.train.examples import TokenLogps, TrainRow, has_references
from prefpipe.stages.train.micro_batches import tree_of
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.reference import audit
from prefpipe.stages.train.reference.identity import Reference

R = TypeVar("R", bound=TrainRow)


@dataclass(frozen=True)
class Audited:
    """What the audit found, for the manifest, and how long it took; nothing where no reference is read."""

    found: dict[str, Any] | None = None
    seconds: float | None = None


def values_for(
    output: Run | None, world: World, rows: Sequence[TrainRow], model: TreeModel, scorer: str, reference: str
) -> dict[str, TokenLogps]:
    """Values by completion id for every row that lacks some: scored once, on all ranks, and then read from the run.

    `output` is the output directory, held by rank 0 only. The caller sees to it that `model` is the reference.
    """
    missing = [row for row in rows if not has_references(row)]
    if not missing:
        return {}
    if not world.tell(output.has_part("ref_logps", 0) if output else False):
        log.info(f"{len(missing)} of {len(rows)} rows have no reference log-probs: they are scored once, now")
        made = _score(missing[world.rank :: world.size], model, scorer, reference)
        found = {r.completion_id: r for share in world.gather(made) for r in share}
        if output:
            output.write_part("ref_logps", RefLogps, 0, to_table(RefLogps, [found[key] for key in sorted(found)]))
    return world.tell(_cached(output))


def filled(rows: Sequence[R], values: dict[str, TokenLogps]) -> list[R]:
    """Rows with the values in place of missing ones."""
    return [row if has_references(row) else row.with_references(values) for row in rows]


def audited(
    world: World,
    model: TreeModel,
    rows: Sequence[TrainRow],
    scorers: set[str],
    config: TrainConfig,
    *,
    base_is_reference: bool,
) -> Audited:
    """Re-score rows by the reference and compare; raises IdentityError when it did not make the values of the rows.
    `scorers` made them."""
    start = clock.monotonic()
    with load.adapter_off(model.policy, off=base_is_reference):
        found = audit.audit(rows, config.audit_rows, partial(_score_together, model, world), config.beta)
    seconds = clock.monotonic() - start
    full = config.dtype == "float32" and all(s.endswith("/float32") for s in scorers) and not config.load_in_4bit
    audit.check(found, exact=scorers == {load.scorer_name("float32")} and full, full_precision=full)
    log.info(
        f"audit: {found.rows} rows re-scored, {found.signed_mean:+.4f} signed and {found.absolute_mean:.4f} absolute "
        f"nats per token, -log sigmoid(beta h) {found.loss:.4f} (ln 2 = 0.6931): the cache belongs to the reference"
    )
    return Audited(found.to_dict(), seconds)


def _score_together(model: TreeModel, world: World, trees: Sequence[Tree]) -> list[list[list[float]]]:
    """Token log-probs of every tree, dealt out to the ranks: all see the same values, and come to the same end."""
    own = list(score(model, trees[world.rank :: world.size]))
    shares = world.gather(own)
    return [shares[i % world.size][i // world.size] for i in range(len(trees))]


def not_audited(reference: Reference) -> Audited:
    """What stands in the manifest in place of an audit."""
    reason = (
        f"reference {reference.id} is unavailable: its name, the rows' token ids and the form of the values were "
        "checked, not whether that model gives these values"
    )
    log.warn(reason)
    return Audited({"rows": 0, "not_checked": reason})


def _cached(output: Run | None) -> dict[str, TokenLogps]:
    if output is None:
        return {}
    rows = from_table(RefLogps, output.read_part("ref_logps", RefLogps, 0))
    return {r.completion_id: tuple(r.token_logps) for r in rows}


def _score(rows: Sequence[TrainRow], model: TreeModel, scorer: str, reference: str) -> list[RefLogps]:
    """This rank's share, prompts together, so that each is computed once."""
    found: dict[str, RefLogps] = {}
    ordered = sorted(rows, key=lambda row: row.prompt)
    with log.progress("reference log-probs", len(rows), "rows") as advance:
        for row, values in zip(ordered, score(model, map(tree_of, ordered)), strict=True):
            for answer, logps in zip(row.answers, values, strict=True):
                digest = ids_digest(row.prompt, answer.ids)
                found[answer.completion_id] = ref_logps(
                    answer.completion_id, digest, logps, reference=reference, scorer=scorer
                )
            advance(1)
    return list(found.values())


def read_ref_logps(runs: Sequence[Path], digests: Mapping[str, str]) -> dict[str, RefLogps]:
    """The cached reference values of the completions in `digests` (completion_id -> ids_digest) from runs of `score` or
    `generate`, part by part; the first run that has a completion counts. Which ones are missing is for the caller.

    Raises IdentityError when a value was made for other token ids, DataError for values of several references.
    """
    found: dict[str, RefLogps] = {}
    for run in runs:
        manifest = store.read_manifest(run)
        for name in store.part_names(run, manifest, "ref_logps"):
            table = store.read_file(run, manifest, name, RefLogps)
            wanted = [
                i for i, key in enumerate(table["completion_id"].to_pylist()) if key in digests and key not in found
            ]
            for row in from_table(RefLogps, table.take(wanted)) if wanted else ():
                if row.ids_digest != digests[row.completion_id]:
                    raise logps_of_other_ids([row.completion_id], run / name)
                found[row.completion_id] = row
    one_reference(row.reference for row in found.values())
    return found
