"""Run directories: open one to write or to resume it, read a complete one.

OUT/config.json                    first: the resolved settings, the identity of the run, and the digest of both
    NAME/part-00000.parquet        data of one shard
    NAME/part-00000.ok.json        its commit record: rows, bytes, blake3, fingerprint, name; the shard counts now
    dropped.parquet                rows that did not go on, with their reason
    manifest.json                  last: every file with its digest; a run is complete when it exists and matches
    timing.jsonl                   times and rates, outside every digest
    quarantine/                    damaged or superseded files: moved, never deleted

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

from prefpipe import clock, log, reading
from prefpipe.config.base import result_fields, runtime_fields
from prefpipe.errors import DataError, MissingInputError
from prefpipe.ids import content_id
from prefpipe.runs import commits, fsio, manifests, saved_config, tables
from prefpipe.runs.storage import utf8_directory
from prefpipe.schemas import VERSION

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """An output directory that this process holds.

    `inputs` maps each input to its digest. `saved` holds the settings of the first start, which a resumed run follows.
    """

    out: Path
    command: str
    fingerprint: str
    inputs: Mapping[str, str]
    saved: Mapping[str, Any]

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
            log.warn(f"{path} is that of another run: it moves to quarantine/")
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

    def has_part(self, dataset: str, index: int) -> bool:
        """Whether a shard is committed by this run and intact. Any other moves to quarantine."""
        part = self._part(dataset, index)
        record = commits.record_path(part)
        if not record.exists():
            return False
        wrong = commits.mismatch(part, self._owner(part))
        if wrong is None:
            return True
        log.warn(f"{part}: {wrong}: it moves to quarantine/ and is made again")
        self._quarantine(part)
        self._quarantine(record)
        return False

    def set_strangers_aside(self) -> None:
        """Move shards of other runs, and shards under another name, to quarantine: nobody asks for them by number."""
        for part in [] if (self.out / "manifest.json").exists() else commits.recorded(self.out):
            wrong = commits.record_mismatch(part, self._owner(part))
            if wrong is not None:
                log.warn(f"{part}: {wrong}: it moves to quarantine/")
                self._quarantine(part)
                self._quarantine(commits.record_path(part))

    def write_part(self, dataset: str, row_type: type, index: int, table: pa.Table) -> None:
        """Write and commit one shard of a dataset. Raises DataError for rows that do not fit the row type."""
        self._write(self._part(dataset, index), row_type, table)

    def write_dropped(self, row_type: type, table: pa.Table) -> None:
        """Write and commit the ledger: rows that did not go on, with their reasons."""
        self._write(self.out / "dropped.parquet", row_type, table)

    def gather_dropped(self, row_type: type, before: pa.Table) -> int:
        """Write the ledger from `before` and the `dropped` dataset. Returns the number of rows of the latter."""
        shards = [self.read_part("dropped", row_type, index) for index in self.parts("dropped")]
        self.write_dropped(row_type, pa.concat_tables([before, *shards]))
        return sum(part.num_rows for part in shards)

    def read_part(self, dataset: str, row_type: type, index: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of a committed shard, or some columns of them."""
        return tables.read_table(self._part(dataset, index), row_type, columns)

    def parts(self, dataset: str) -> list[int]:
        """The numbers of the committed shards of a dataset."""
        records = (self.out / dataset).glob("part-*.ok.json")
        return sorted(int(p.name.removeprefix("part-").removesuffix(".ok.json")) for p in records)

    def write_report(self, name: str, report: Mapping[str, Any]) -> None:
        """Write a small JSON file. The manifest lists those that `commits` names."""
        fsio.write_text(self.out / name, json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    def finish(
        self, totals: Mapping[str, Any], identity: Mapping[str, Any], balances: Iterable[manifests.Balance] = ()
    ) -> Manifest:
        """Write the manifest of every committed file. The run is complete from here on.

        `totals` are counts and metrics, `identity` names the models that took part. Raises DataError when a balance
        does not add up, or a file is not the one that was committed.
        """
        for balance in balances:
            balance.check(self.out)
        files = {str(p.relative_to(self.out)): self._described(p) for p in commits.committed(self.out)}
        content = {
            "command": self.command,
            "fingerprint": self.fingerprint,
            "inputs": dict(self.inputs),
            "identity": dict(identity),
            "totals": dict(totals),
            "files": files,
        }
        return manifests.write(self.out / "manifest.json", content)

    def log_timing(self, **values: object) -> None:
        """Append a line to timing.jsonl: the time of day, and `values`."""
        fsio.append_line(self.out / "timing.jsonl", json.dumps({"at": clock.utc_now(), **values}))

    def _part(self, dataset: str, index: int) -> Path:
        return self.out / dataset / f"part-{index:05d}.parquet"

    def _write(self, path: Path, row_type: type, table: pa.Table) -> None:
        tables.write_table(path, row_type, table)
        commits.commit(path, row_type, table.num_rows, self._owner(path))

    def _owner(self, path: Path) -> dict[str, str]:
        return {"fingerprint": self.fingerprint, "name": str(path.relative_to(self.out))}

    def _described(self, path: Path) -> dict[str, Any]:
        """Size and digest of a file for the manifest. Its commit record, where it has one, must say the same."""
        description = commits.describe(path)
        if path.suffix == ".parquet" and commits.record_path(path).exists():
            owner = {} if commits.is_nested(self.out, path) else self._owner(path)
            wrong = commits.record_mismatch(path, owner, description["blake3"])
            if wrong is not None:
                raise DataError(f"{path}: {wrong}", "run the same command again: the file is made again")
        return description

    def _quarantine(self, path: Path) -> None:
        if path.exists():
            fsio.move_aside(path, self.out / "quarantine")


@contextmanager
def open_run(out: Path, command: str, config: BaseModel, inputs: Mapping[str, str], *, force: bool) -> Generator[Run]:
    """Hold `out` for one run of `command`. `inputs` maps each input to the digest of its content.

    Raises UsageError when `out` belongs to other settings, inputs or another command; `force` moves its files to
    quarantine/ instead. A run that left every row out is no reason: its file may be mended. Raises LockedError when
    another process holds `out`.
    """
    identity = {
        "command": command,
        "schema": VERSION,
        **result_fields(config),
        **{f"input:{k}": v for k, v in inputs.items()},
    }
    identity = json.loads(json.dumps(identity))
    with fsio.lock(out):
        path = out / "config.json"
        saved = saved_config.read(path, force=force)
        if saved is None:
            saved_config.refuse_foreign(out, force=force)
        fsio.remove_leftovers(out)
        if saved is not None and saved["identity"] != _as_then(saved["identity"], identity, config):
            if not force and not saved_config.holds_ledger_alone(out):
                raise saved_config.belongs_to_another(out, saved["identity"], identity)
            saved = None
        if force:
            # config.json goes last: until then the directory is known as a run, and --force can be repeated.
            for old in sorted(out.iterdir(), key=lambda p: p.name == "config.json"):
                if old.name not in saved_config.NO_CONTENT:
                    fsio.move_aside(old, out / "quarantine")
            saved = None
        if saved is None:
            saved = saved_config.write(path, command, config, identity)
        settings = saved_config.settings(path, type(config), saved["config"])
        run = Run(out, command, content_id(saved["identity"]), inputs, settings)
        run.set_strangers_aside()
        yield run


def input_digest(path: Path) -> str:
    """The digest of an input: of a run, that of its manifest; of a file, that of its bytes."""
    if path.is_dir():
        return read_manifest(path)["digest"]
    return reading.file_digest(path)


def read_manifest(run_dir: Path) -> Manifest:
    """The manifest of a complete run. Raises MissingInputError when there is none, DataError when it is damaged."""
    path = run_dir / "manifest.json"
    if not path.exists():
        raise MissingInputError(
            f"{run_dir} holds no complete run (no manifest.json)",
            "finish it by running its command again, or check the path",
        )
    return manifests.read(path)


def read_dataset(run_dir: Path, dataset: str, row_type: type, columns: list[str] | None = None) -> pa.Table:
    """All rows of a dataset of a complete run. Each file is checked against its digest before it is read.

    Raises MissingInputError without a manifest or dataset, DataError for a damaged file or another schema version.
    """
    manifest = read_manifest(run_dir)
    return pa.concat_tables(
        [read_file(run_dir, manifest, name, row_type, columns) for name in part_names(run_dir, manifest, dataset)]
    )


def part_names(run_dir: Path, manifest: Manifest, dataset: str) -> list[str]:
    """The files of a dataset of a complete run, in order. Raises MissingInputError when it has none."""
    names = sorted(n for n in manifest["files"] if n.startswith(f"{dataset}/") and n.endswith(".parquet"))
    if not names:
        raise MissingInputError(
            f"{run_dir} has no dataset '{dataset}'",
            f"it was made by `{manifest['command']}` and has: {', '.join(datasets(manifest))}",
        )
    return names


def datasets(manifest: Manifest) -> list[str]:
    """The names of the datasets of a complete run."""
    return sorted({n.rsplit("/", 1)[0] for n in manifest["files"] if "/" in n})


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


def _as_then(then: Mapping[str, Any], now: Mapping[str, Any], config: BaseModel) -> dict[str, Any]:
    """An identity with the settings that had a part in it when the run was started, and have none any more."""
    return {**now, **{name: then[name] for name in runtime_fields(type(config)) if name in then}}


def _check_digest(run_dir: Path, manifest: Manifest, name: str) -> None:
    if not commits.matches(run_dir / name, manifest["files"][name]["blake3"]):
        raise DataError(
            f"{run_dir / name} is damaged: its bytes do not match the digest in the manifest",
            f"run the command that made {run_dir} again: it remakes only the damaged file",
        )
