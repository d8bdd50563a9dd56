"""The rows of a dataset of a run as a polars frame: filtered, sorted and limited, with texts from related datasets.

Rows of `completions` get the turns of their prompt and a column for each reward of the run, rows of `margins` the
conversations of their pairs.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from prefpipe.config.base import suggestion
from prefpipe.errors import MissingInputError, PrefpipeError, UsageError
from prefpipe.views import run_view
from prefpipe.views.run_view import RunView

# The datasets by how likely users want to see them; for each the column by which a row is bad, the lower the worse.
_MAIN = ("pairs", "labels", "groups", "evaluations", "completions", "ref_logps", "margins")
_WORST = {
    "pairs": "reward_gap",
    "labels": "reward",
    "evaluations": "reward",
    "ref_logps": "ref_logps",
    "kl_bank": "ref_logps",
    "margins": "margin",
}
_REWARDS = "rewards/"
_TEXTS = ("prompt", "chosen", "rejected")  # of a pair


@dataclass(frozen=True)
class RowQuery:
    """Which rows to show.

    dataset: the dataset; empty for the main dataset of the run
    row: only rows with this id, or whose id begins with it
    where: only rows for which this SQL condition holds
    worst: only so many of the worst rows; 0 for all
    limit: at most so many rows; 0 for all
    """

    dataset: str = ""
    row: str = ""
    where: str = ""
    worst: int = 0
    limit: int = 0


def main_dataset(run: RunView) -> str:
    """The dataset that users most likely want to see. Raises MissingInputError for a run without rows."""
    found = next((name for name in (*_MAIN, *run.rows) if name in run.rows), None)
    if found is None:
        raise MissingInputError(
            f"{run.path} has no committed rows", "`prefpipe runs DIR` lists the runs below DIR and how far they are"
        )
    return found


def selected(run: RunView, query: RowQuery) -> tuple[str, pl.DataFrame]:
    """The name of the dataset, and the rows that the query selects.

    Raises UsageError for an unknown dataset or column and for a wrong condition, MissingInputError for an unknown id.
    """
    if query.row and not query.dataset:
        return _rows_with_id(run, query.row)
    name = query.dataset or main_dataset(run)
    frame = scan(run, name)
    if query.row:
        frame = frame.filter(_has_id(frame, query.row))
    columns = [column for column, kind in frame.collect_schema().items() if not kind.is_nested()]
    if query.where:
        with _bad_condition(query.where, columns):
            frame = frame.filter(pl.sql_expr(query.where))
    if query.worst:
        frame = frame.sort(_worst_column(run, name), nulls_last=False, maintain_order=True).head(query.worst)
    if query.limit:
        frame = frame.head(query.limit)
    with _bad_condition(query.where, columns):
        rows = frame.collect()
    if query.row and rows.is_empty():
        raise _unknown_id(run, query.row)
    return name, rows


def scan(run: RunView, dataset: str) -> pl.LazyFrame:
    """The committed rows of a dataset, of older versions too. Raises UsageError where the run has no such dataset."""
    if dataset not in run.rows:
        raise UsageError(
            f"{run.path} has no dataset '{dataset}'{suggestion(dataset, list(run.rows))}",
            f"it has: {', '.join(run.rows) or 'none yet'}",
        )
    frame = plain(run, dataset)
    if dataset == "margins":
        return _with_texts(run, frame)
    if dataset != "completions":
        return frame
    if "prompts" in run.rows:
        prompts = plain(run, "prompts").select("prompt_id", prompt="messages").unique("prompt_id")
        frame = frame.join(prompts, on="prompt_id", how="left", maintain_order="left")
    for name in reward_names(run):
        rewards = plain(run, _REWARDS + name).select("completion_id", pl.col("reward").alias(name))
        frame = frame.join(rewards.unique("completion_id"), on="completion_id", how="left", maintain_order="left")
    return frame


def reward_names(run: RunView) -> list[str]:
    """The rewards of a run, in the order of its settings."""
    found = [name.removeprefix(_REWARDS) for name in run.rows if name.startswith(_REWARDS)]
    asked = [name for name in run.config.get("rewards", ()) if name in found]
    return [*asked, *(name for name in found if name not in asked)]


def id_columns(schema: pl.Schema) -> list[str]:
    """The columns of a dataset that hold ids of rows."""
    return [name for name in schema if name == "id" or name.endswith("_id")]


def plain(run: RunView, dataset: str) -> pl.LazyFrame:
    """The committed rows of a dataset exactly as its files hold them."""
    files = run_view.parts(run, dataset)
    return pl.concat([pl.scan_parquet(file, glob=False) for file in files], how="diagonal_relaxed")


def _with_texts(run: RunView, margins: pl.LazyFrame) -> pl.LazyFrame:
    """Margins with the conversations of their pairs, where the runs with the pairs still exist."""
    found: list[pl.LazyFrame] = []
    for place in (*run.config.get("pairs", ()), *run.config.get("eval_pairs", ())):
        with suppress(PrefpipeError, OSError, ValueError):  # the pairs came from a file, or their run is gone
            source = run_view.view(Path(place))
            if "pairs" in source.rows:
                found.append(plain(source, "pairs").select(*_TEXTS, row_id="pair_id"))
    if not found:
        return margins
    texts = pl.concat(found, how="vertical_relaxed").unique("row_id")
    return margins.join(texts, on="row_id", how="left", maintain_order="left")


@contextmanager
def _bad_condition(condition: str, columns: list[str]) -> Generator[None]:
    """Raise UsageError in place of polars' error when it parses or applies an SQL condition."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        if not condition:
            raise
        reason = re.split(r"[;\n]", str(error))[0]
        raise UsageError(
            f"--where {condition!r}: {reason}", f"write a condition as in SQL; the columns are {', '.join(columns)}"
        ) from error


def _has_id(frame: pl.LazyFrame, row: str) -> pl.Expr:
    return pl.any_horizontal([pl.col(name).str.starts_with(row) for name in id_columns(frame.collect_schema())])


def _rows_with_id(run: RunView, row: str) -> tuple[str, pl.DataFrame]:
    """The first dataset that holds an id, in the order of _MAIN, and its rows with that id."""
    for name in sorted(run.rows, key=lambda n: _MAIN.index(n) if n in _MAIN else len(_MAIN)):
        frame = scan(run, name)
        rows = frame.filter(_has_id(frame, row)).collect()
        if not rows.is_empty():
            return name, rows
    raise _unknown_id(run, row)


def _unknown_id(run: RunView, row: str) -> MissingInputError:
    return MissingInputError(f"{run.path} has no row with the id {row}", f"it has rows in: {', '.join(run.rows)}")


def _worst_column(run: RunView, dataset: str) -> str:
    if dataset == "completions" and (names := reward_names(run)):
        return names[0]
    if dataset.startswith(_REWARDS):
        return "reward"
    if dataset in _WORST:
        return _WORST[dataset]
    raise UsageError(f"nothing says which rows of {dataset} are the worst", "use --where, or --limit")
