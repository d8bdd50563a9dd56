"""`prefpipe export FORMAT RUN --out DIR` for rows: a run of `build-pairs` as JSON lines for another trainer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefpipe import log
from prefpipe.errors import DataError, RowFault, UsageError
from prefpipe.exports.shapes import TRAINERS, Trainer
from prefpipe.rows import PREFERENCES, key_of
from prefpipe.runs import fsio, manifests, store
from prefpipe.schemas import from_table

_ROWS = "rows.jsonl"
_BATCH = 4096  # rows in memory as Python objects


def export(form: str, directory: Path, out: Path) -> tuple[int, str]:
    """Write the pairs or labels of a run into `out`, a new directory: rows.jsonl, and further files that the trainer
    needs. Returns the number of rows, and the name of their dataset.

    Raises UsageError for a run without rows that the trainer can train on and for an `out` that is not empty, DataError
    where a row cannot be written in the trainer's format; nothing is written then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty", "choose an empty or a new --out")
    manifest = store.read_manifest(directory)
    trainer = TRAINERS[form]
    there = manifests.datasets(manifest)
    dataset = next((name for name in trainer.rows if name in there), None)
    if dataset is None:
        raise UsageError(
            f"{directory} has {', '.join(there)}, and {form} reads {' or '.join(trainer.rows)}",
            "name a run of `prefpipe build-pairs` with --format prefpipe",
        )
    count = 0

    def fill(into: Path) -> None:
        nonlocal count
        with (into / _ROWS).open("w", encoding="utf-8") as file:
            for row in _shaped(trainer, directory, manifest, dataset, form):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        for name, content in trainer.files(dataset).items():
            (into / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    fsio.publish_dir(out, fill)
    return count, dataset


def _shaped(trainer: Trainer, run_dir: Path, manifest: store.Manifest, dataset: str, form: str) -> Iterator[Any]:
    """The rows in the format of a trainer. Raises DataError after the last row, where some cannot be written in it."""
    faults: list[str] = []
    count, weighted = 0, 0
    for row in _rows(run_dir, manifest, dataset):
        count += 1
        weighted += row.weight != 1 or getattr(row, "preference_prob", None) is not None
        try:
            yield trainer.rows[dataset](row)
        except RowFault as fault:
            faults.append(f"{key_of(row)}: {fault.detail}")
    if faults:
        raise DataError(
            f"{len(faults)} of {count} {dataset} cannot be said in the shape of {form} (first: {faults[0]})",
            "build-pairs --format trl carries everything; `prefpipe train` trains on it as it is",
        )
    if weighted:
        log.warn(f"{weighted} rows have a weight or a soft label, which {form} does not read")


def _rows(run_dir: Path, manifest: store.Manifest, dataset: str) -> Iterator[Any]:
    row_type = PREFERENCES[dataset]
    for name in store.part_names(run_dir, manifest, dataset):
        table = store.read_file(run_dir, manifest, name, row_type)
        for start in range(0, table.num_rows, _BATCH):
            yield from from_table(row_type, table.slice(start, _BATCH))
