"""Reference log-probs before step 0: missing ones are computed by the reference and kept in the run, then re-scoring
rows proves that the reference gives these values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prefpipe import clock, log
from prefpipe.config.train import TrainConfig
from prefpipe.forward import load
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import SCORING_TOKENS, TreeModel, pack, score
from prefpipe.ids import ids_digest
from prefpipe.rows import logps_of_other_ids, one_reference, ref_logps
from prefpipe.runs import store
from prefpipe.runs.store import Run
from prefpipe.schemas import RefLogps, from_table, to_table
from prefpipe.stages.train.examples import RefLogpsById, TokenLogps, TrainRow, has_ref_logps
from prefpipe.stages.train.micro_batches import tree_of
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.reference import audit
from prefpipe.stages.train.reference.identity import Reference
from prefpipe.stages.train.session import Session

R = TypeVar("R", bound=TrainRow)


@dataclass(frozen=True)
class AuditResult:
    """The audit for the manifest, and how long it took; nothing where no loss reads a reference."""

    report: dict[str, Any] | None = None
    seconds: float | None = None


def missing_ref_logps(
    session: Session, rows: Sequence[TrainRow], model: TreeModel, scorer: str, reference_id: str
) -> dict[str, TokenLogps]:
    """Reference log-probs by completion id for every row that lacks some: computed once, on all ranks, and then read
    from the run. `model` must compute as the reference does: that is for the caller to see to."""
    missing = [row for row in rows if not has_ref_logps(row)]
    if not missing:
        return {}
    if not session.lead(lambda run: run.has_shard(["ref_logps"], 0)):
        log.info(f"{len(missing)} of {len(rows)} rows have no reference log-probs: they are scored once, now")
        world = session.world
        shares = world.gather(_score(missing, world, model, scorer, reference_id))
        session.lead(lambda run: _write(run, [logps for share in shares for logps in share]))
    return session.lead(_read) or {}


def fill_missing(rows: Sequence[R], values: RefLogpsById) -> list[R]:
    """Rows with `values` in place of missing reference log-probs."""
    return [row if has_ref_logps(row) else row.with_ref_logps(values) for row in rows]


def audit_rows(
    world: World,
    model: TreeModel,
    rows: Sequence[TrainRow],
    scorers: set[str],
    config: TrainConfig,
    *,
    base_is_reference: bool,
) -> AuditResult:
    """Re-score rows by the reference and compare. Raises IdentityError when it does not give the cached log-probs,
    which `scorers` computed."""
    start = clock.monotonic()
    with load.adapter_off(model.policy, off=base_is_reference):
        result = audit.audit(rows, config.audit_rows, partial(_score_together, model, world), config.beta)
    seconds = clock.monotonic() - start
    full = config.dtype == "float32" and all(s.endswith("/float32") for s in scorers) and not config.load_in_4bit
    audit.check(result, exact=scorers == {load.scorer_name("float32")} and full, full_precision=full)
    log.info(
        f"audit: {result.rows} rows re-scored, {result.signed_mean:+.4f} signed and {result.absolute_mean:.4f} "
        f"absolute nats per token, -log sigmoid(beta h) {result.loss:.4f} (ln 2 = 0.6931): the cache belongs to the "
        "reference"
    )
    return AuditResult(result.to_dict(), seconds)


def not_audited(reference: Reference) -> AuditResult:
    """The entry in the manifest of a run whose reference is not at hand."""
    reason = (
        f"reference {reference.id} is unavailable: its name, the rows' token ids and the form of the values were "
        "checked, not whether that model gives these values"
    )
    log.warn(reason)
    return AuditResult({"rows": 0, "not_checked": reason})


def _score_together(model: TreeModel, world: World, trees: Sequence[Tree]) -> list[list[list[float]]]:
    """Token log-probs of every completion of every tree, on every rank: each rank computes a share, and all come to the
    same verdict."""
    share = list(_share_of(model, trees[world.rank :: world.size], trees[0]))
    shares = world.gather(share)
    return [shares[i % world.size][i // world.size] for i in range(len(trees))]


def _share_of(model: TreeModel, trees: Sequence[Tree], spare: Tree) -> Iterator[list[list[float]]]:
    """As `score`, of the trees of this rank; where the model is cut over the ranks, all make equally many passes, some
    of them over `spare`."""
    packs = list(pack(trees, SCORING_TOKENS))
    passes = model.agree(len(packs))
    for packed in packs:
        yield from score(model, packed)
    for _ in range(passes - len(packs)):
        list(score(model, [spare]))


def _score(rows: Sequence[TrainRow], world: World, model: TreeModel, scorer: str, reference_id: str) -> list[RefLogps]:
    """Reference log-probs of this rank's share of rows; those of one prompt are neighbours, so that the prompt is
    computed once."""
    scored: dict[str, RefLogps] = {}
    ordered = sorted(rows[world.rank :: world.size], key=lambda row: row.prompt_ids)
    values_of = _share_of(model, list(map(tree_of, ordered)), tree_of(rows[0]))
    with log.progress("reference log-probs", len(ordered), "rows") as advance:
        for row, values in zip(ordered, values_of, strict=True):
            for completion, logps in zip(row.completions, values, strict=True):
                digest = ids_digest(row.prompt_ids, completion.token_ids, completion.mask)
                scored[completion.completion_id] = ref_logps(
                    completion.completion_id, digest, logps, reference=reference_id, scorer=scorer
                )
            advance(1)
    return list(scored.values())


def _write(run: Run, scored: Sequence[RefLogps]) -> None:
    by_id = {logps.completion_id: logps for logps in scored}
    run.write_part("ref_logps", RefLogps, 0, to_table(RefLogps, [by_id[key] for key in sorted(by_id)]))


def _read(run: Run) -> dict[str, TokenLogps]:
    rows = from_table(RefLogps, run.read_part("ref_logps", RefLogps, 0))
    return {row.completion_id: tuple(row.token_logps) for row in rows}


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
