"""What can be known of a run directory without running it: its command, its state, its numbers, its lineage."""

import fcntl
import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefpipe import reading
from prefpipe.errors import DataError, MissingInputError
from prefpipe.runs import commits, manifests, saved_config, store

State = Literal["complete", "running", "interrupted", "damaged"]
_INPUT = "input:"  # in front of the names of inputs in the identity of a run
_NOT_RUNS = ("quarantine", "checkpoints")
_TAIL = 1 << 16  # bytes at the end of metrics.jsonl: some twenty lines


@dataclass(frozen=True)
class RunView:
    """A run directory as it is now.

    `inputs` maps each input to the digest of its content, `rows` each dataset to its committed rows, and `totals` holds
    the counts and metrics of a complete run. `last_step` is the newest line of metrics.jsonl, of `train` only.
    `problem` says what is damaged.
    """

    path: Path
    command: str
    state: State
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    rows: Mapping[str, int]
    totals: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    last_step: Mapping[str, Any] = field(default_factory=dict)
    bytes: int = 0
    changed: float = 0.0
    """When a file of the run changed last, in seconds since the epoch."""
    problem: str = ""


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run."""
    return reading.is_there(path / "config.json")


def view(path: Path) -> RunView:
    """The run in a directory. Raises MissingInputError where there is no run."""
    if not reading.is_there(path):
        raise MissingInputError(
            f"{path} does not exist", "check the path; `prefpipe runs DIR` lists the runs below DIR"
        )
    try:
        saved = saved_config.read(path / "config.json", force=False)
    except DataError as error:
        return RunView(path, "?", "damaged", {}, {}, {}, problem=error.message, **_on_disk(path))
    if saved is None:
        raise MissingInputError(
            f"{path} holds no run of prefpipe (no config.json)", "`prefpipe runs DIR` lists the runs below DIR"
        )
    manifest, problem = _manifest(path)
    held: State = "running" if _is_held(path) else "interrupted"
    state: State = "damaged" if problem else "complete" if manifest else held
    identity = saved["identity"]
    return RunView(
        path,
        str(saved["command"]),
        state,
        saved["config"],
        manifest.get("inputs") or {k.removeprefix(_INPUT): v for k, v in identity.items() if k.startswith(_INPUT)},
        _rows(path),
        manifest.get("totals", {}),
        manifest.get("identity", {}),
        manifest.get("digest", ""),
        _last_step(path / "metrics.jsonl"),
        problem=problem,
        **_on_disk(path),
    )


def below(root: Path) -> Iterator[Path]:
    """Every run directory in `root` and in its folders, runs inside runs included, in the order of their paths."""
    if is_run(root):
        yield root
    with reading.reading(root):
        folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name not in _NOT_RUNS and not p.is_symlink())
    for folder in folders:
        yield from below(folder)


def parts(path: Path, dataset: str) -> list[Path]:
    """The committed files of a dataset of a run, in order; the gathered ledger alone where there is one."""
    if dataset == "dropped" and commits.record_path(path / "dropped.parquet").exists():
        return [path / "dropped.parquet"]
    return sorted(p for p in commits.recorded(path) if str(p.parent.relative_to(path)) == dataset)


def row_type_of(part: Path) -> str:
    """The name of the row type of a committed file."""
    return str(manifests.read_json(commits.record_path(part))["dataset"])


def _is_held(path: Path) -> bool:
    """Whether a process works on a run now. The question takes a shared lock for a moment, and writes nothing."""
    lock = path / ".lock"
    if not reading.is_there(lock):
        return False
    with reading.opened(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks: nobody holds the run by one
            return False
    return False


def _manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a run, or nothing, and what is damaged about it."""
    try:
        return store.read_manifest(path), ""
    except MissingInputError:
        return {}, ""
    except DataError as error:
        return {}, error.message


def _rows(path: Path) -> dict[str, int]:
    """Committed rows by dataset."""
    rows: dict[str, int] = {}
    for part in commits.recorded(path):
        name = part.stem if part.parent == path else str(part.parent.relative_to(path))
        if name == "dropped" and part.parent != path and (path / "dropped.parquet").exists():
            continue  # the shards of a ledger that is gathered
        try:
            rows[name] = rows.get(name, 0) + int(manifests.read_json(commits.record_path(part))["rows"])
        except (DataError, KeyError, TypeError, ValueError):
            continue  # a record that is being written, or a damaged one: the run itself makes it again
    return dict(sorted(rows.items()))


def _last_step(path: Path) -> dict[str, Any]:
    """The newest whole line of metrics.jsonl."""
    if not reading.is_there(path):
        return {}
    with reading.opened(path) as file, reading.reading(path):
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with suppress(ValueError, RecursionError):  # the line that is being written, or the rest of a long one
            parsed = json.loads(line)
            if isinstance(parsed, dict):
                return parsed
    return {}


def _on_disk(path: Path) -> dict[str, Any]:
    """Bytes of a run directory, runs inside it included, and when it changed last."""
    size, changed = 0, 0.0
    with reading.reading(path):
        for file in path.rglob("*"):
            with suppress(FileNotFoundError):  # a run that is going renames its files
                status = file.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    size, changed = size + status.st_size, max(changed, status.st_mtime)
    return {"bytes": size, "changed": changed}
