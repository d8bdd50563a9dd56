"""Run directories: open one to write or to resume it, read a complete one.

OUT/config.json                    first: the resolved settings, the identity of the run, and the digest of both
    NAME/part-00000.parquet        data of one shard
    NAME/part-00000.ok.json        its commit record (`commits`): the shard counts now
    dropped.parquet                rows that did not go on, with their reason
    manifest.json                  last: every file with its digest; a run is complete when it exists and matches
    timing.jsonl, quarantine/      times, rates and memory, outside every digest; damaged or superseded files

config.json may be passed as a recipe: the same command then makes the same run.
"""

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from prefpipe import clock, log, memory, reading
from prefpipe.errors import DataError, MissingInputError
from prefpipe.ids import content_id
from prefpipe.runs import commits, fsio, manifests, resume, saved_config, tables
from prefpipe.runs.resume import RowInputs
from prefpipe.runs.storage import utf8_directory

Manifest = dict[str, Any]
Table = Mapping[str, Any]
NO_ROWS: Mapping[str, str] = {}
_NO_INPUT = "the input has no rows for it now"


@dataclass(frozen=True)
class Run:
    """An output directory that this process holds.

    `inputs` maps each input to its digest. `saved` holds the settings of the first start, which a resumed run follows.
    `fingerprint` is of settings and inputs; `shard_fingerprint` leaves out inputs whose rows the shards record, if they
    do (`records_rows`).
    """

    out: Path
    command: str
    fingerprint: str
    inputs: Mapping[str, str]
    saved: Mapping[str, Any]
    shard_fingerprint: str
    records_rows: bool = False

    def manifest(self, holds: Callable[[Manifest], bool] = lambda _manifest: True) -> Manifest | None:
        """The manifest of a complete run, with a line in the log; None while there is work to do.

        Damaged files move to quarantine. `holds` checks what a manifest says of things outside its directory.
        """
        path = self.out / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest = read_manifest(self.out)
        except DataError as error:
            log.warn(f"{error.message}: it moves to quarantine/ and is made again")
            self._quarantine(path)
            return None
        if manifest.get("fingerprint") != self.fingerprint:
            log.warn(f"{path} is that of other rows or of another run: it moves to quarantine/")
            self._quarantine(path)
            return None
        files = manifest["files"].items()
        damaged = [name for name, file in files if not commits.matches(self.out / name, file["blake3"])]
        if not damaged:
            if not holds(manifest):
                return None
            log.info(f"{self.out} is complete already")
            return manifest
        for name in damaged:
            log.warn(f"{self.out / name} is damaged or missing: it moves to quarantine/ and is made again")
            for piece in commits.remade_with(name):
                self._quarantine(self.out / piece)
        self._quarantine(path)
        return None

    def has_shard(self, datasets: Iterable[str], index: int, rows: Mapping[str, str] = NO_ROWS) -> bool:
        """Whether all datasets of a shard are committed by this run, intact, and of these rows (see `write_part`).
        Others move to quarantine."""
        parts = [self.part(name, index) for name in datasets]
        there = [part for part in parts if commits.record_path(part).exists()]
        found = {part: commits.mismatch(part, {**self._owner(part), **rows}) for part in there}
        wrong = {part: why for part, why in found.items() if why is not None}
        for part, why in [*wrong.items()][:1]:  # one line for the files of a shard
            log.warn(f"{part}: {why}: it moves to quarantine/ and is made again")
        for part in wrong:
            self._set_aside(part)
        return there == parts and not wrong

    def set_strangers_aside(self) -> None:
        """Move shards of other runs, and shards under another name, to quarantine: nobody asks for them by number."""
        for part in [] if (self.out / "manifest.json").exists() else commits.recorded(self.out):
            wrong = commits.record_mismatch(part, self._owner(part))
            if wrong is not None:
                self._set_aside(part, wrong)

    def set_aside_from(self, dataset: str, number: int) -> None:
        """Move the shards of a dataset from `number` on to quarantine: a mended input may have fewer."""
        for index in (index for index in self.parts(dataset) if index >= number):
            self._set_aside(self.part(dataset, index), _NO_INPUT)

    def set_others_aside(self, parts: Iterable[tuple[str, int]]) -> None:
        """Move every shard but `parts`, (dataset, number), to quarantine: a mended input may have fewer."""
        for part in sorted(commits.shards(self.out).difference(self.part(*part) for part in parts)):
            self._set_aside(part, _NO_INPUT)

    def write_part(
        self, dataset: str, row_type: type, index: int, table: tables.Content, rows: Mapping[str, str] = NO_ROWS
    ) -> None:
        """Write and commit a shard of a dataset, see `new_part`. Raises DataError for rows that do not fit the type."""
        commits.commit([self.new_part(dataset, row_type, index, table, rows)])

    def new_part(
        self, dataset: str, row_type: type, index: int, table: tables.Content, rows: Mapping[str, str] = NO_ROWS
    ) -> commits.File:
        """One shard of a dataset for `commits.commit`; `rows` are digests of those rows of an input that it holds."""
        path = self.part(dataset, index)
        return commits.File(path, row_type, table, {**self._owner(path), **rows})

    def write_dropped(self, row_type: type, table: pa.Table) -> None:
        """Write and commit the ledger: rows that did not go on, with their reasons."""
        path = self.out / "dropped.parquet"
        commits.commit([commits.File(path, row_type, table, self._owner(path))])

    def gather_dropped(self, row_type: type, before: pa.Table) -> int:
        """Write the ledger from `before` and the `dropped` dataset. Returns the number of rows of the latter."""
        shards = [self.read_part("dropped", row_type, index) for index in self.parts("dropped")]
        self.write_dropped(row_type, pa.concat_tables([before, *shards]))
        return sum(part.num_rows for part in shards)

    def read_part(self, dataset: str, row_type: type, index: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of a committed shard, or some columns of them."""
        return tables.read_table(self.part(dataset, index), row_type, columns)

    def parts(self, dataset: str) -> list[int]:
        """The numbers of the committed shards of a dataset."""
        records = (self.out / dataset).glob("part-*.ok.json")
        return sorted(int(p.name.removeprefix("part-").removesuffix(".ok.json")) for p in records)

    def write_report(self, name: str, report: Mapping[str, Any]) -> None:
        """Write a small JSON file. The manifest lists those that `commits` names."""
        fsio.write_text(self.out / name, json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    def finish(
        self, totals: Table, identity: Table, balances: Iterable[manifests.Balance] = (), places: Table | None = None
    ) -> Manifest:
        """Write the manifest of every committed file: the run is complete. `totals` are counts and metrics, `identity`
        names the models that took part, `places` has the directories of runs that `totals` name by digest. Raises
        DataError when a balance does not add up, or a file is not the one that was committed."""
        for balance in balances:
            balance.check(self.out)
        files = {str(p.relative_to(self.out)): self._described(p) for p in commits.committed(self.out)}
        content = {
            "command": self.command,
            "fingerprint": self.fingerprint,
            "inputs": dict(self.inputs),
            "identity": dict(identity),
            "totals": dict(totals),
            **({"places": dict(places)} if places else {}),
            "files": files,
        }
        return manifests.write(self.out / "manifest.json", content)

    def log_timing(self, **values: object) -> None:
        """Append a line to timing.jsonl: the time of day, `values`, and the peak of the memory."""
        fsio.append_line(self.out / "timing.jsonl", json.dumps({"at": clock.utc_now(), **values, **memory.peaks()}))

    def part(self, dataset: str, index: int) -> Path:
        """The file of one shard of a dataset."""
        return self.out / dataset / f"part-{index:05d}.parquet"

    def _owner(self, path: Path) -> dict[str, str]:
        return {"fingerprint": self.shard_fingerprint, "name": str(path.relative_to(self.out))}

    def _described(self, path: Path) -> dict[str, Any]:
        """Size and digest of a file for the manifest. Its commit record, where it has one, must say the same."""
        description = commits.describe(path)
        if path.suffix == ".parquet" and commits.record_path(path).exists():
            owner = {} if commits.is_nested(self.out, path) else self._owner(path)
            wrong = commits.record_mismatch(path, owner, description["blake3"])
            if wrong is not None:
                raise DataError(f"{path}: {wrong}", "run the same command again: the file is made again")
        return description

    def _set_aside(self, part: Path, why: str = "") -> None:
        if why:
            log.warn(f"{part}: {why}: it moves to quarantine/")
        self._quarantine(part)
        self._quarantine(commits.record_path(part))

    def _quarantine(self, path: Path) -> None:
        if path.exists():
            fsio.move_aside(path, self.out / "quarantine")


@contextmanager
def open_run(
    out: Path,
    command: str,
    config: BaseModel,
    inputs: Mapping[str, str],
    *,
    force: bool,
    by_row: RowInputs | None = None,
) -> Generator[Run]:
    """Hold `out` for one run of `command`. `inputs` maps each input to the digest of its content.

    Raises UsageError when `out` belongs to other settings, inputs or another command; `force` moves its files to
    quarantine/ instead. Of the inputs `by_row` the shards record the rows: one that was mended is no reason, nor is one
    of which every row was left out. Raises LockedError when another process holds `out`.
    """
    identity = resume.identity(command, config, inputs)
    with fsio.lock(out):
        saved = resume.prepare(out, command, config, identity, by_row, force=force)
        settings = saved_config.settings(out / "config.json", type(config), saved["config"])
        whole, own = content_id(saved_config.identity(saved)), content_id(saved["identity"])
        run = Run(out, command, whole, inputs, settings, own, "row_inputs" in saved)
        run.set_strangers_aside()
        yield run


def input_digest(path: Path) -> str:
    """The digest of an input: of a run, that of its manifest; of a file, that of its bytes."""
    return read_manifest(path)["digest"] if path.is_dir() else reading.file_digest(path)


def read_manifest(run_dir: Path) -> Manifest:
    """The manifest of a complete run. Raises MissingInputError when there is none, DataError when it is damaged."""
    path = run_dir / "manifest.json"
    if not path.exists():
        raise MissingInputError(
            f"{run_dir} holds no complete run (no manifest.json)",
            "finish it by running its command again, or check the path; `prefpipe score` makes a run of a file",
        )
    return manifests.read(path)


def read_dataset(run_dir: Path, dataset: str, row_type: type, columns: list[str] | None = None) -> pa.Table:
    """All rows of a dataset of a complete run. Each file is checked against its digest before it is read.

    Raises MissingInputError without a manifest or dataset, DataError for a damaged file or another schema version.
    """
    manifest = read_manifest(run_dir)
    parts = [read_file(run_dir, manifest, name, row_type, columns) for name in part_names(run_dir, manifest, dataset)]
    return pa.concat_tables(parts)


def part_names(run_dir: Path, manifest: Manifest, dataset: str) -> list[str]:
    """The files of a dataset of a complete run, in order. Raises MissingInputError when it has none."""
    names = sorted(n for n in manifest["files"] if n.startswith(f"{dataset}/") and n.endswith(".parquet"))
    if not names:
        raise manifests.lacking(run_dir, manifest, dataset)
    return names


def scannable_files(run_dir: Path, dataset: str, row_type: type) -> list[Path]:
    """The paths of a dataset, for polars, which verifies no page checksum: digests and schemas are checked first.

    Raises as `read_dataset` does.
    """
    manifest = read_manifest(run_dir)
    names = part_names(run_dir, manifest, dataset)
    for name in names:
        _check_digest(run_dir, manifest, name)
        tables.check_schema(run_dir / name, row_type)
    return [utf8_directory(run_dir) / name for name in names]


def read_file(
    run_dir: Path, manifest: Manifest, name: str, row_type: type, columns: list[str] | None = None
) -> pa.Table:
    """The rows of one file of a complete run. Raises as `read_dataset` does."""
    if name not in manifest["files"]:
        raise MissingInputError(f"{run_dir} has no file '{name}'", "check which directory you passed")
    _check_digest(run_dir, manifest, name)
    return tables.read_table(run_dir / name, row_type, columns)


def _check_digest(run_dir: Path, manifest: Manifest, name: str) -> None:
    if not commits.matches(run_dir / name, manifest["files"][name]["blake3"]):
        raise DataError(
            f"{run_dir / name} is damaged: its bytes do not match the digest in the manifest",
            f"run the command that made {run_dir} again: it remakes only the damaged file",
        )
