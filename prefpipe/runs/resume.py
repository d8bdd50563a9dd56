"""Whether a run goes on in a directory, and with which inputs.

The commit records of a shard have the digest of its rows, where a run reads an input row by row. When such an input was
mended, shards whose rows are unchanged stay, and the others are made again.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefpipe import log
from prefpipe.config.base import PATH, dump, result_fields, runtime_fields
from prefpipe.runs import commits, fsio, saved_config
from prefpipe.schemas import VERSION

ROWS = "input_rows"  # in a commit record: the digest of the rows of the shard


@dataclass(frozen=True)
class RowInputs:
    """Inputs that a run reads row by row.

    names: those whose digest may change, none for a stream that has no digest
    shards: by the settings of the first start, the digest of the rows of every shard, in order, as the inputs are now
    """

    names: Collection[str]
    shards: Callable[[Mapping[str, Any]], Iterable[str]]


def identity(command: str, config: BaseModel, inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that the results of a run depend on, as JSON types."""
    named = {f"input:{name}": digest for name, digest in inputs.items()}
    return json.loads(json.dumps({"command": command, "schema": VERSION, **result_fields(config), **named}))


def prepare(
    out: Path, command: str, config: BaseModel, now: Mapping[str, Any], by_row: RowInputs | None, *, force: bool
) -> dict[str, Any]:
    """What config.json of a run holds, after it was written where the run starts, starts over, or has mended inputs.
    `now` is the identity of the command.

    The caller holds the lock of `out`. Raises as `open_run` does.
    """
    path = out / "config.json"
    names = None if by_row is None else [f"input:{name}" for name in by_row.names]
    saved = saved_config.read(path, force=force)
    if saved is None:
        saved_config.refuse_foreign(out, force=force)
    now = _as_then(saved, now, config)
    fsio.remove_leftovers(out)
    if saved is not None and not force and saved_config.identity(saved) != now:
        if by_row is not None and names and _only_rows_differ(saved, now, names):
            first = saved_config.settings(path, type(config), saved["config"])
            _check_mended(out, saved, config, now, by_row.shards(first))
            return saved_config.write(path, command, {**first, **_paths(config)}, now, names)
        if not saved_config.holds_ledger_alone(out):
            raise saved_config.belongs_to_another(out, saved_config.identity(saved), now)
        saved = None
    if force:
        # config.json goes last: until then the directory is known as a run, and --force can be repeated.
        for old in sorted(out.iterdir(), key=lambda p: p.name == "config.json"):
            if old.name not in saved_config.NO_CONTENT:
                fsio.move_aside(old, out / "quarantine")
        saved = None
    return saved or saved_config.write(path, command, dump(config), now, names)


def _as_then(saved: Mapping[str, Any] | None, now: Mapping[str, Any], config: BaseModel) -> Mapping[str, Any]:
    """An identity with the settings that had a part in it when the run was started, and have none any more."""
    then = saved["identity"] if saved is not None else {}
    return {**now, **{name: then[name] for name in runtime_fields(type(config)) if name in then}}


def _only_rows_differ(saved: Mapping[str, Any], now: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether config.json names the same settings, and the shards record the rows of the inputs `names`."""
    settings = {key: value for key, value in now.items() if key not in names}
    return saved["identity"] == settings and saved.get("row_inputs", {}).keys() == {*names}


def _check_mended(
    out: Path, saved: Mapping[str, Any], config: BaseModel, now: Mapping[str, Any], shards: Iterable[str]
) -> None:
    """Say how many committed shards hold rows that the inputs have still. Raises UsageError where none does and this
    may be another input by mistake: it stands in another place, or the run is complete."""
    held = commits.recorded_values(out, ROWS)
    stay = sum(digest in held.get(index, ()) for index, digest in enumerate(shards))
    moved = any(saved["config"].get(name) != value for name, value in _paths(config).items())
    if held and not stay and (moved or (out / "manifest.json").exists()):
        raise saved_config.belongs_to_another(out, saved_config.identity(saved), now)
    log.info(
        f"the input changed since {out} was started: of {len(held)} shards {stay} hold the same rows and stay, "
        f"{len(held) - stay} move to quarantine/ and are made again"
    )


def _paths(config: BaseModel) -> dict[str, Any]:
    """The settings that are paths of inputs."""
    fields = type(config).model_fields
    return {name: value for name, value in dump(config).items() if PATH in fields[name].metadata}
