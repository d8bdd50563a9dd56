"""Datasets of the hub, read as a stream by the package `datasets`.

`hf:OWNER/NAME[@REVISION][:CONFIG][/SPLIT]` names a dataset, `hf://datasets/OWNER/NAME[@REVISION]/FILE` a file of one.
"""

import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefpipe import extras
from prefpipe.errors import MissingInputError, UsageError

_NAME = re.compile(r"hf:(?P<name>[^/@:]+/[^/@:]+)(@(?P<revision>[^:/]+))?(:(?P<config>[^/]+))?(/(?P<split>.+))?")
_URL = re.compile(r"hf://datasets/[^/@]+/[^/@]+(@(?P<revision>[^/]+))?/.+")
_HOW = "write hf:OWNER/NAME[@REVISION][:CONFIG][/SPLIT], or hf://datasets/OWNER/NAME[@REVISION]/FILE"


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset. None stands for the default of the hub."""

    name: str
    revision: str | None
    config: str | None
    split: str


def is_hub(path: str | Path) -> bool:
    """Whether a path names a dataset of the hub."""
    return isinstance(path, str) and path.startswith("hf:")


def names_revision(source: str) -> bool:
    """Whether a name of the hub says which revision it means; without one it may change."""
    found = _URL.fullmatch(source) or _NAME.fullmatch(source)
    return found is not None and found["revision"] is not None


def parse(source: str) -> HubDataset:
    """The parts of a name such as hf:trl-lib/ultrafeedback_binarized@main:default/train. Raises UsageError for another
    form."""
    found = _NAME.fullmatch(source)
    if found is None:
        raise UsageError(f"{source} names no dataset of the hub", _HOW)
    return HubDataset(found["name"], found["revision"], found["config"], found["split"] or "train")


def rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a dataset of the hub. Raises MissingInputError where it cannot be read, UsageError for another form
    of name."""
    of_url = source.startswith("hf://")
    if of_url and _URL.fullmatch(source) is None:
        raise UsageError(f"{source} names no file of a dataset", _HOW)
    wanted = None if of_url else parse(source)
    if importlib.util.find_spec("datasets") is None:
        raise MissingInputError(f"{source} is read by the package datasets", extras.hint("hub"))
    try:
        for row in _stream(source, wanted):
            yield without_nulls(row)
    except Exception as error:  # the package raises whatever its file systems and formats raise
        raise MissingInputError(
            f"cannot read {source}: {' '.join(str(error).split())[:300]}",
            "check name, revision, split and network; a private dataset needs HF_TOKEN",
        ) from error


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose structs lack the fields that are null: Arrow gives every struct of a column the fields of all. NaN,
    by which some programs say that a value is missing, is null."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _stream(source: str, wanted: HubDataset | None) -> Any:
    import datasets

    if wanted is None:
        kind = "parquet" if source.endswith(".parquet") else "json"
        return datasets.load_dataset(kind, data_files=source, split="train", streaming=True)
    return datasets.load_dataset(
        wanted.name, wanted.config, split=wanted.split, revision=wanted.revision, streaming=True
    )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
