"""A run directory as it is now: what `runs.overview` says of it, its committed rows, its size and its age."""

import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefpipe import reading
from prefpipe.errors import DataError
from prefpipe.runs import commits, logs, manifests, overview, saved_config
from prefpipe.runs.storage import utf8_directory

_NOT_RUNS = ("quarantine", "checkpoints")
_INPUT = "input:"  # prefix of the names of inputs in the identity of a run


@dataclass(frozen=True)
class RunView:
    """A run directory as it is now.

    inputs: digest of the content of each input
    rows: number of committed rows of each dataset
    files: the committed Parquet files, relative to `path`
    totals: counts and metrics of a complete run
    last_step: the newest line of metrics.jsonl, for `train` only
    changed: when a file of the run changed last, in seconds since the epoch
    problem: what is damaged
    """

    path: Path
    command: str
    state: str
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    rows: Mapping[str, int] = field(default_factory=dict[str, int])
    files: Sequence[str] = ()
    totals: Mapping[str, Any] = field(default_factory=dict[str, Any])
    digest: str = ""
    last_step: Mapping[str, Any] = field(default_factory=dict[str, Any])
    bytes: int = 0
    changed: float = 0.0
    problem: str = ""


def view(path: Path) -> RunView:
    """The run in a directory. Raises MissingInputError where the directory does not exist, DataError where it is not a
    run."""
    run = overview.look(path)
    size, changed = _on_disk(path)
    return RunView(
        path,
        run.command,
        run.state,
        run.config,
        run.manifest.get("inputs") or _saved_inputs(path),
        _rows(path, run.files),
        run.files,
        run.totals,
        str(run.manifest.get("digest", "")),
        next(reversed(logs.tail(path / "metrics.jsonl")), {}),
        size,
        changed,
        "; ".join(f"{gap.where}: {gap.why}" for gap in run.gaps),
    )


def below(root: Path) -> Iterator[RunView]:
    """Every run in `root` and below, runs inside runs too, in the order of their paths. An unreadable run is
    damaged."""
    if reading.is_there(root / "config.json"):
        try:
            yield view(root)
        except DataError as error:
            yield RunView(root, "?", "damaged", problem=error.message)
    with reading.reading(root):
        folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name not in _NOT_RUNS and not p.is_symlink())
    for folder in folders:
        yield from below(folder)


def parts(run: RunView, dataset: str) -> list[Path]:
    """The committed files of a dataset of a run, in order, as paths for polars."""
    root = utf8_directory(run.path)
    names = [name for name in run.files if _dataset(name) == dataset]
    gathered = f"{dataset}.parquet"
    return [root / name for name in ([gathered] if gathered in names else sorted(names))]


def _dataset(name: str) -> str:
    """The dataset of a file of a run: the name of its folder, or of the file where it is in none."""
    folder, _, file = name.rpartition("/")
    return folder or file.removesuffix(".parquet")


def _rows(path: Path, files: Sequence[str]) -> dict[str, int]:
    """The number of committed rows by dataset. Where a ledger has been gathered, its shards are not counted again."""
    rows: dict[str, int] = {}
    for name in files:
        dataset = _dataset(name)
        if f"{dataset}.parquet" in files and "/" in name:
            continue
        with suppress(DataError, KeyError, TypeError, ValueError):  # the run itself repairs a damaged record
            count = int(manifests.read_json(commits.record_path(path / name))["rows"])
            rows[dataset] = rows.get(dataset, 0) + count
    return dict(sorted(rows.items()))


def _saved_inputs(path: Path) -> dict[str, str]:
    """The inputs of an incomplete run."""
    try:
        saved = saved_config.read(path / "config.json", force=True)
    except DataError:
        return {}
    named = saved_config.identity(saved).items() if saved is not None else ()
    return {name.removeprefix(_INPUT): str(digest) for name, digest in named if name.startswith(_INPUT)}


def _on_disk(path: Path) -> tuple[int, float]:
    """The bytes of a run directory, including the runs inside it, and when a file of it changed last."""
    size, changed = 0, 0.0
    with reading.reading(path):
        for file in path.rglob("*"):
            with suppress(FileNotFoundError):  # a run that is still going renames its files
                status = file.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    size, changed = size + status.st_size, max(changed, status.st_mtime)
    return size, changed
