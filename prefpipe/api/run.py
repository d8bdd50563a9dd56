"""A run as an object: where it is, what was asked for, what came out of it, and its rows as frames."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa

from prefpipe import extras, reading
from prefpipe.api import calls
from prefpipe.config.base import local_path, suggestion
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.runs import commits, logs, manifests, tables
from prefpipe.runs.storage import utf8_directory
from prefpipe.views import facts, rows, run_view, settings

if TYPE_CHECKING:
    from datasets import Dataset


class Run:
    """A run directory, complete, going on or cut off, as it is when it is loaded.

    It stands for its directory: as a setting of the next command, and wherever Python takes a path.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Raises MissingInputError where there is no such directory, DataError where it holds no run."""
        self._view = run_view.view(local_path(os.fspath(directory), "directory"))

    @property
    def path(self) -> Path:
        """Its directory."""
        return self._view.path

    @property
    def command(self) -> str:
        """The command that made it, such as build-pairs."""
        return self._view.command

    @property
    def state(self) -> str:
        """complete, running (a process works on it), or unfinished: the same call goes on."""
        return self._view.state

    @cached_property
    @calls.in_words()
    def manifest(self) -> Mapping[str, Any]:
        """What a complete run says of itself: inputs and files with their digests, models, counts and results, versions
        of packages. Raises MissingInputError for a run that is not complete, DataError for a damaged one."""
        if not reading.is_there(self.path / "manifest.json"):
            raise MissingInputError(f"{self.path} is {self.state}: it has no manifest", "make the same call again")
        return manifests.read(self.path / "manifest.json")

    @property
    def digest(self) -> str:
        """What identifies a complete run: its settings, inputs, results and the bytes of its files; else empty."""
        return self._view.digest

    @property
    def config(self) -> Mapping[str, Any]:
        """Its settings by name; tables are mappings. `recipe=run.path / "config.json"` makes the same run."""
        return self._view.config

    @property
    def totals(self) -> Mapping[str, Any]:
        """Counts and results of a complete run; empty while it is not complete."""
        return self._view.totals

    @property
    def datasets(self) -> list[str]:
        """The names of its datasets, such as pairs or rewards/NAME. docs/datasets.md lists their columns."""
        return list(self._view.rows)

    @property
    def metrics(self) -> pl.DataFrame:
        """Numbers of the run as a frame: of train a row for each optimizer step, of iterate a row for each round that
        was evaluated, of other commands one row. Numbers inside tables have dotted names. Empty before the first."""
        lines = logs.lines(self.path / "metrics.jsonl") or self.totals.get("rounds") or [self.totals]
        return pl.DataFrame([cells for line in lines if (cells := _cells(line))], infer_schema_length=None)

    @calls.in_words()
    def arrow(self, dataset: str = "") -> pa.Table:
        """The rows of a dataset, by default of the one that people come for, as they stand in its files.

        Every file is compared with its digest, and pages with their checksums. Raises UsageError for a dataset that is
        not there, DataError for a damaged file, MissingInputError for a run without rows.
        """
        found = [tables.read_parquet(path) for path in self._files(dataset or rows.main_dataset(self._view))]
        return pa.concat_tables(found, promote_options="default")

    @calls.in_words()
    def polars(self, dataset: str = "", *, joined: bool = False) -> pl.DataFrame:
        """The same as a frame of polars. `joined` sets beside completions their prompts and rewards (a column each),
        beside margins the texts of their pairs. Raises as `arrow` does."""
        dataset = dataset or rows.main_dataset(self._view)
        self._files(dataset)
        return rows.scan(self._view, dataset).collect() if joined else rows.plain(self._view, dataset).collect()

    @calls.in_words()
    def to_datasets(self, dataset: str = "") -> Dataset:
        """The same as a Dataset of Hugging Face's `datasets`; pairs have the columns that TRL reads. Raises as `arrow`
        does, and MissingInputError without that package."""
        try:
            from datasets import Dataset, Features, table
        except ModuleNotFoundError as error:
            raise MissingInputError(
                f"to_datasets() needs the package '{error.name}'", f"install it with: {extras.command('hub')}"
            ) from error
        found = self.arrow(dataset).replace_schema_metadata()
        return Dataset(table.InMemoryTable(found.cast(Features.from_arrow_schema(found.schema).arrow_schema)))

    def _files(self, dataset: str) -> list[Path]:
        """The files of a dataset, each as it was committed. Raises as `arrow` does."""
        calls.refuse_fork()
        if dataset not in self._view.rows:
            raise UsageError(
                f"{self.path} has no dataset '{dataset}'{suggestion(dataset, self.datasets)}",
                f"it has: {', '.join(self.datasets) or 'none yet'}",
            )
        found, root = run_view.parts(self._view, dataset), utf8_directory(self.path)
        described = self.manifest["files"] if self.state == "complete" else {}
        for path in found:
            name = str(path.relative_to(root))
            if described:
                is_intact = commits.matches(path, described[name]["blake3"])
            else:
                is_intact = commits.mismatch(path, {}) is None
            if not is_intact:
                raise DataError(f"{self.path / name} is damaged", "make the same call again: the file is made again")
        return found

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"<prefpipe {self.command} '{self.path}': {self.state}, {facts.headline(self._view)}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        counts = ", ".join(f"{name} ({count:,})" for name, count in self._view.rows.items()) or "none yet"
        cells = {
            "directory": str(self.path),
            "state": facts.state(self._view),
            "result": facts.headline(self._view),
            "datasets": counts,
            **({"digest": self.digest} if self.digest else {}),
        }
        lines = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in cells.items())
        return f"<table><caption>prefpipe {html.escape(self.command)}</caption>{lines}</table>"


def _cells(line: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and texts by dotted name; lists as JSON."""
    found = settings.flat(line).items()
    return {name: json.dumps(value) if isinstance(value, list) else value for name, value in found if value != {}}
