"""Reference log-probs before step 0: missing ones are computed by the reference and kept in the run, then re-scoring
rows proves that the reference gives these values."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa

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
from prefpipe.stages.train import row_files
from prefpipe.stages.train.examples import RefLogpsById, TrainRow, has_ref_logps
from prefpipe.stages.train.mapped import Rows, column, prompt_numbers, select
from prefpipe.stages.train.micro_batches import tree_of
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.record_batches import Batch
from prefpipe.stages.train.reference import audit
from prefpipe.stages.train.reference.identity import Reference
from prefpipe.stages.train.session import Session
from prefpipe.stages.train.token_logps import TokenLogpsById

R = TypeVar("R", bound=TrainRow)


@dataclass(frozen=True)
class AuditResult:
    """The audit for the manifest, and how long it took; nothing where no loss reads a reference."""

    report: dict[str, Any] | None = None
    seconds: float | None = None


@dataclass
class Kept:
    """What forward passes of the reference gave in this process, for runs over the same rows: log-probs of rows that
    had none, and of the rows of the audit. `passes` and `audits` count them. They are kept if runs `follow`."""

    follow: bool = False
    missing: pa.Table | None = None
    audited: list[list[list[float]]] | None = None
    passes: int = 0
    audits: int = 0


def missing_ref_logps(
    session: Session, rows: Sequence[TrainRow], model: TreeModel | None, scorer: str, reference_id: str, kept: Kept
) -> RefLogpsById:
    """Reference log-probs by completion id for every row that lacks some: computed once, on all ranks, and then read
    from the run. `model` must compute as the reference does: that is for the caller to see to. It may be None where
    `kept` has been filled."""
    missing = select(rows, np.flatnonzero(~column(rows, Batch.has_refs)))
    if not len(missing):
        return {}
    if not session.lead(lambda run: run.has_shard(["ref_logps"], 0)):
        scored = kept.missing
        if scored is None:
            assert model is not None
            log.info(f"{len(missing)} of {len(rows)} rows have no reference log-probs: they are scored once, now")
            world = session.world
            own = _score(missing, world, model, scorer, reference_id)
            scored, kept.passes = pa.concat_tables(world.gather(to_table(RefLogps, own))), kept.passes + 1
        session.lead(lambda run: _write(run, scored))
    if kept.follow and kept.missing is None:
        kept.missing = session.lead(lambda run: run.read_part("ref_logps", RefLogps, 0))
    return session.lead(_read) or {}


def fill_missing(rows: Sequence[R], values: RefLogpsById, beside: Path | None = None) -> Sequence[R]:
    """Rows with `values` in place of missing reference log-probs; views of a file `beside` which one with them goes."""
    view: object = rows
    if isinstance(view, Rows) and isinstance(values, TokenLogpsById) and beside is not None:
        return cast("Sequence[R]", row_files.with_refs(view, values, beside))
    return [row if has_ref_logps(row) else row.with_ref_logps(values) for row in rows]


def audit_rows(
    world: World,
    model: TreeModel | None,
    rows: Sequence[TrainRow],
    scorers: set[str],
    config: TrainConfig,
    kept: Kept,
) -> AuditResult:
    """Re-score rows by the reference and compare. Raises IdentityError when it does not give the cached log-probs,
    which `scorers` computed. `model` computes as the reference does, and may be None where `kept` has been filled."""
    start = clock.monotonic()

    def score_once(trees: Sequence[Tree]) -> list[list[list[float]]]:
        if kept.audited is not None:
            return kept.audited
        kept.audits += 1
        assert model is not None
        found = _score_together(model, world, trees)
        kept.audited = found if kept.follow else None
        return found

    before = kept.audits
    result = audit.audit(rows, config.audit_rows, score_once, config.beta)
    seconds = clock.monotonic() - start
    full = config.dtype == "float32" and all(s.endswith("/float32") for s in scorers) and not config.load_in_4bit
    audit.check(result, exact=scorers == {load.scorer_name("float32")} and full, full_precision=full)
    how = "re-scored" if kept.audits > before else "compared with what was re-scored for the first run"
    log.info(
        f"audit: {result.rows} rows {how}, {result.signed_mean:+.4f} signed and {result.absolute_mean:.4f} "
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
    share = list(_share_of(model, lambda: trees[world.rank :: world.size], trees[0]))
    shares = world.gather(share)
    return [shares[i % world.size][i // world.size] for i in range(len(trees))]


def _share_of(model: TreeModel, trees: Callable[[], Iterable[Tree]], spare: Tree) -> Iterator[list[list[float]]]:
    """As `score`, of the trees of this rank; where the model is cut over the ranks, all make equally many passes, some
    of them over `spare`. `trees` are made twice, to count the passes and for them: all at once may not fit."""
    own = sum(1 for _ in pack(trees(), SCORING_TOKENS))
    passes = model.agree(own)
    yield from score(model, trees())
    for _ in range(passes - own):
        list(score(model, [spare]))


def _score(rows: Sequence[TrainRow], world: World, model: TreeModel, scorer: str, reference_id: str) -> list[RefLogps]:
    """Reference log-probs of this rank's share of rows; those of one prompt are neighbours, so that the prompt is
    computed once."""
    scored: dict[str, RefLogps] = {}
    own = select(rows, range(world.rank, len(rows), world.size))
    ordered = select(own, np.argsort(prompt_numbers(own), kind="stable"))
    values_of = _share_of(model, lambda: map(tree_of, ordered), tree_of(rows[0]))
    with log.progress("reference log-probs", len(ordered), "rows") as advance:
        for row, values in zip(ordered, values_of, strict=True):
            for completion, logps in zip(row.completions, values, strict=True):
                digest = ids_digest(row.prompt_ids, completion.token_ids, completion.mask)
                scored[completion.completion_id] = ref_logps(
                    completion.completion_id, digest, logps, reference=reference_id, scorer=scorer
                )
            advance(1)
    return list(scored.values())


def _write(run: Run, scored: pa.Table) -> None:
    places = {key: place for place, key in enumerate(scored["completion_id"].to_pylist())}
    run.write_part("ref_logps", RefLogps, 0, scored.take([places[key] for key in sorted(places)]))


def _read(run: Run) -> RefLogpsById:
    return TokenLogpsById(run.read_part("ref_logps", RefLogps, 0, ["completion_id", "token_logps"]))


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
