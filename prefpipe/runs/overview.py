"""What run directories hold, for people to look at: complete, still written to, or cut off. Nothing here writes.

A reader of results refuses a run without a manifest; a reader of this module gets what there is, and `Gap`s that say
what is missing or damaged.
"""

import fcntl
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefpipe import log, reading
from prefpipe.errors import DataError, MissingInputError, PrefpipeError, StorageError
from prefpipe.runs import commits, manifests, tables
from prefpipe.schemas import Dropped, from_table

State = Literal["complete", "running", "unfinished", "not started"]
STEPS = ("generate", "score", "build-pairs", "replay", "train", "evaluate")  # of a round of `iterate`, in order
_SOME = ("score", "replay")  # that not every round has
_SOURCES = {  # command -> settings that name the runs it reads
    "score": ("inputs",),
    "build-pairs": ("completions", "reward_runs", "ref_logps", "policy_logps"),
    "train": ("pairs", "labels", "groups", "ref_logps"),
    "sweep": ("pairs", "labels", "groups", "ref_logps"),
}
_MOST_ROUNDS = 1000  # a config that somebody edited may say anything
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Gap:
    """Something that is not there or cannot be read: where, and why."""

    where: str
    why: str


@dataclass(frozen=True)
class Overview:
    """One run. `name` is its place below the directory that was asked for, `manifest` is empty until it is complete,
    `files` are its committed Parquet files, relative to `path`."""

    path: Path
    name: str
    command: str
    state: State
    config: Record
    manifest: Record
    files: Sequence[str] = ()
    round: int | None = None
    gaps: Sequence[Gap] = ()

    @property
    def totals(self) -> Record:
        """Counts and results; empty while the run is not complete."""
        return manifests.placed(self.manifest)

    def has(self, dataset: str) -> bool:
        """Whether a committed file of this dataset is there."""
        return any(name.startswith(f"{dataset}/") for name in self.files)


@dataclass(frozen=True)
class Rows:
    """Rows of a dataset as plain dicts: the first ones of its files. `total` counts those that were not read too."""

    rows: Sequence[dict[str, Any]]
    total: int


def look(directory: Path, name: str = "") -> Overview:
    """What the run in `directory` is and how far it got.

    Raises MissingInputError when there is no such directory, DataError when it holds no run of prefpipe.
    """
    if not reading.is_there(directory):
        raise MissingInputError(
            f"{directory} does not exist", "check the path; it is relative to the current directory"
        )
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory", "name the --out of a command of prefpipe")
    saved, gaps = _record(directory / "config.json")
    manifest, more = _record(directory / "manifest.json", manifests.read)
    command = manifest.get("command") or saved.get("command")
    if not isinstance(command, str):
        why = "; ".join(f"{gap.where}: {gap.why}" for gap in gaps) or "it has no config.json of a command"
        raise DataError(f"{directory} holds no run of prefpipe: {why}", "name the --out of a command of prefpipe")
    config = saved.get("config")
    return Overview(
        directory,
        name or directory.resolve().name,
        command,
        "complete" if manifest else "running" if _is_held(directory) else "unfinished",
        config if isinstance(config, dict) else {},
        manifest,
        _committed(directory, manifest),
        _round(name),
        (*gaps, *more, *_lost(directory, name, manifest)),
    )


def rounds(root: Overview) -> Sequence[Overview]:
    """Every step of a run of `iterate` in order; while it is not complete, those that it has not come to as well."""
    done, asked = root.totals.get("rounds"), root.config.get("rounds")
    evaluated = done[-1] if isinstance(done, list) and done and isinstance(done[-1], dict) else {}
    numbers = (evaluated.get("round"), asked)
    last = min(next((number for number in numbers if isinstance(number, int)), 0), _MOST_ROUNDS)
    return [_step(root, number, folder) for number in range(last + 1) for folder in _folders(root, number, last)]


def _folders(root: Overview, number: int, last: int) -> Sequence[str]:
    """The steps of a round by their folders. Not every round has an evaluation."""
    here, every = root.path / f"round-{number}", root.config.get("evaluate_every")
    skipped = {STEPS[-1]} if number != last and isinstance(every, int) and every > 0 and number % every else set[str]()
    return [s for s in STEPS if s not in (*_SOME, *skipped) or (here / s).is_dir()] if number else STEPS[-1:]


def sources(run: Overview) -> tuple[Sequence[Overview], Sequence[Gap]]:
    """The runs that a run was made from, nearest first and each once, and those that are gone or have changed."""
    found: dict[Path, Overview] = {}
    gaps: list[Gap] = []
    waiting = [run]
    while waiting:
        reader = waiting.pop(0)
        for setting in _SOURCES.get(reader.command, ()):
            for number, text in enumerate(_texts(reader.config.get(setting))):
                source = _source(reader, setting, number, text)
                if isinstance(source, Gap):
                    gaps.append(source)
                elif source is not None and source.path not in found:
                    found[source.path] = source
                    waiting.append(source)
    return list(found.values()), gaps


def rows(
    run: Overview,
    dataset: str,
    row_type: type,
    limit: int,
    columns: Sequence[str] | None = None,
    ids: Collection[str] | None = None,
) -> Rows:
    """The first `limit` rows of a dataset, from committed files in order; one that cannot be read is warned of. With
    `ids` only those that have one of them in the first of the `columns`."""
    names = sorted(name for name in run.files if name.startswith(f"{dataset}/"))
    found: list[dict[str, Any]] = []
    total = 0
    for name in names:
        record, _ = _record(commits.record_path(run.path / name))
        total += record["rows"] if isinstance(record.get("rows"), int) else 0
        if len(found) >= limit:
            continue
        try:
            table = tables.read_table(run.path / name, row_type, list(columns) if columns else None)
        except PrefpipeError as error:
            log.warn(f"{error.message}: it is left out")
            continue
        if ids is not None and columns:
            table = tables.among(table, sorted(ids), columns[0])
        found += table.slice(0, limit - len(found)).to_pylist()
    return Rows(found, max(total, len(found)))


def ledger(run: Overview) -> Counter[str]:
    """Rows that did not go on, by reason: from the totals, else from the ledger itself."""
    counted = run.totals.get("dropped")
    if isinstance(counted, dict):
        return Counter({str(reason): count for reason, count in counted.items() if isinstance(count, int)})
    found = Counter[str]()
    names = (
        ["dropped.parquet"] if "dropped.parquet" in run.files else [n for n in run.files if n.startswith("dropped/")]
    )
    for name in names:
        try:
            found.update(row.reason for row in from_table(Dropped, tables.read_table(run.path / name, Dropped)))
        except PrefpipeError:
            continue
    return found


def report(run: Overview, name: str) -> Record:
    """A small JSON file of a run, such as parity.json; empty when it is not there or damaged."""
    return _record(run.path / name)[0]


def alerts(run: Overview) -> Sequence[Record]:
    """The alerts of a run of `train`: of the manifest, else of its newest checkpoint."""
    found = run.totals.get("alerts")
    if found is None:
        for path in sorted(run.path.glob("checkpoints/step-*/state.json"), reverse=True):
            state = _record(path)[0].get("diagnostics")
            if isinstance(state, dict):
                found = state.get("alerts")
                break
    return [alert for alert in found if isinstance(alert, dict)] if isinstance(found, list) else []


def _source(reader: Overview, setting: str, number: int, text: str) -> Overview | Gap | None:
    """The run that a setting names; None where it names a file or a dataset from elsewhere."""
    digest = (reader.manifest.get("inputs") or {}).get(f"{setting}.{number}")
    try:
        if "://" in text or text.startswith("hf:") or not (Path(text) / "config.json").is_file():
            return None if Path(text).exists() or ":" in text else Gap(text, "it is not there any more")
        found = look(Path(text), text)
    except (PrefpipeError, OSError, ValueError) as error:
        return Gap(text, getattr(error, "message", str(error)))
    if digest is not None and found.manifest.get("digest") != digest:
        return Gap(text, "it was made again since this run read it")
    return found


def _step(root: Overview, number: int, command: str) -> Overview:
    name = f"round-{number}/{command}"
    try:
        return look(root.path / name, name)
    except PrefpipeError as error:
        gaps = () if isinstance(error, MissingInputError) else (Gap(name, error.message),)
        return Overview(root.path / name, name, command, "not started", {}, {}, (), number, gaps)


def _lost(directory: Path, name: str, manifest: Record) -> Iterator[Gap]:
    """Files of a complete run that are gone or have another size; their bytes are not read."""
    for file, described in (manifest.get("files") or {}).items():
        try:
            size = (directory / file).stat().st_size
        except OSError as error:
            yield Gap(f"{name or directory.name}/{file}", error.strerror or str(error))
            continue
        if isinstance(described.get("bytes"), int) and described["bytes"] != size:
            yield Gap(f"{name or directory.name}/{file}", f"{size:,} bytes, not {described['bytes']:,}: it is damaged")


def _record(
    path: Path, read: Callable[[Path], dict[str, Any]] = manifests.read_json
) -> tuple[dict[str, Any], Sequence[Gap]]:
    """What a file holds; nothing, with a gap, where it is damaged."""
    if not reading.is_there(path):
        return {}, ()
    try:
        return read(path), ()
    except PrefpipeError as error:
        return {}, (Gap(path.name, error.message),)


def _committed(directory: Path, manifest: Record) -> Sequence[str]:
    if manifest:
        return sorted(name for name in manifest["files"] if name.endswith(".parquet"))
    try:
        return sorted(str(path.relative_to(directory)) for path in commits.recorded(directory))
    except PrefpipeError:
        return ()


def _is_held(directory: Path) -> bool:
    """Whether a process works on a run now. The question takes a shared lock for a moment, and writes nothing; who
    wants to work on the run waits as long (`fsio.lock`)."""
    try:
        with reading.opened(directory / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except MissingInputError:
        return False
    except StorageError as error:  # `opened` turns what the operating system says into it
        return isinstance(error.__cause__, BlockingIOError)
    return False


def _round(name: str) -> int | None:
    number = name.partition("/")[0].removeprefix("round-")
    return int(number) if name.startswith("round-") and number.isdigit() else None


def _texts(value: object) -> Sequence[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
