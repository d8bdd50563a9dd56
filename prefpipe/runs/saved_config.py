"""The file config.json: what it holds, and how a resumed run knows that nobody changed it."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from prefpipe import reading
from prefpipe.config.base import dump, explain
from prefpipe.errors import DataError, UsageError
from prefpipe.runs import commits, fsio, manifests

_BESIDE_WORK = ("config.json", "timing.jsonl", "inflight.log", "report.html")
NO_CONTENT = (".lock", ".owner", "quarantine")  # a directory that holds nothing else is empty
START_OVER = "start over with --force (the old files move to its quarantine/)"


def write(
    path: Path,
    command: str,
    settings: Mapping[str, Any],
    identity: Mapping[str, Any],
    by_row: Collection[str] | None = None,
) -> dict[str, Any]:
    """Write config.json with its seal and return what it holds. `by_row` names the parts of the identity that stand
    apart, since the shards record the rows of these inputs; None where they record no rows."""
    saved: dict[str, Any] = {"command": command, "config": settings}
    saved["identity"] = {key: value for key, value in identity.items() if key not in (by_row or ())}
    if by_row is not None:
        saved["row_inputs"] = {key: identity[key] for key in by_row}
    saved = manifests.sealed(saved)
    fsio.write_text(path, json.dumps(saved, indent=2, ensure_ascii=False) + "\n")
    return saved


def identity(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and inputs that config.json names; in a run of an older version they stand together."""
    return {**saved["identity"], **saved.get("row_inputs", {})}


def read(path: Path, *, force: bool) -> dict[str, Any] | None:
    """What config.json of a run holds; None where there is none, or one of something else.

    Raises DataError where it is damaged or was edited, unless `force` moves it away. One of an older version has no
    seal.
    """
    if not reading.is_there(path):
        return None
    try:
        saved = manifests.read_json(path)
    except DataError as error:
        if force:
            return None
        raise DataError(error.message, f"put the file back as it was, or {START_OVER}") from error
    if not {"command", "config", "identity"} <= saved.keys() or not isinstance(saved["identity"], dict):
        return None
    if "record_id" in saved and not manifests.is_intact(saved) and not force:
        raise DataError(
            f"{path} is damaged, or was edited after the run had started", f"undo the change, or {START_OVER}"
        )
    return saved


def settings(path: Path, cls: type[BaseModel], saved: Any) -> dict[str, Any]:
    """The settings of the first start, checked by their class; one that this version does not have is left out."""
    try:
        return dump(cls.model_validate({name: saved[name] for name in cls.model_fields if name in saved}))
    except (TypeError, ValidationError) as error:
        lines = explain(cls, error) if isinstance(error, ValidationError) else ["its settings are no table"]
        raise DataError(f"{path} is damaged: {'; '.join(lines)}", f"undo the change, or {START_OVER}") from error


def holds_ledger_alone(out: Path) -> bool:
    """Whether a run wrote its ledger and nothing else: no row was left to work on."""
    names = {path.name for path in out.iterdir()} - {*NO_CONTENT, *_BESIDE_WORK}
    return names == {"dropped.parquet", "dropped.ok.json"}


def belongs_to_another(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> UsageError:
    """The error for a directory that holds a run of other settings or inputs; it names those that differ."""
    hint = f"choose another --out, or {START_OVER}"
    keys = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    keys = ["command"] if "command" in keys else keys  # all others differ then
    listed = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in keys)
    if keys == ["merge"] and new["merge"]:  # what comes after the training needs no other one
        hint = f"leave out --merge; once the run is complete, `prefpipe merge {out} --out DIR` writes the merged model"
    return UsageError(f"{out} belongs to another run: {listed}", hint)


def refuse_foreign(out: Path, *, force: bool) -> None:
    """Raise UsageError for a directory with files of something else. With `force`, commit records tell a run whose
    config.json is damaged or lost."""
    if force and commits.recorded(out):
        return
    if any(p.name not in NO_CONTENT and not fsio.is_leftover(p) for p in out.iterdir()):
        raise UsageError(f"{out} is not empty and is not a run of prefpipe", "choose an empty or a new --out")
