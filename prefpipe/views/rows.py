"""The rows of a dataset of a run as a polars frame: filtered, ordered, cut, with what belongs beside them.

Rows of `completions` get the turns of their prompt and one column for each reward of the run, `margins` the
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

# The datasets that people come for, in that order; by which column a row is bad, the lower the worse.
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
class Question:
    """Which rows to show: those with the id `row` (or a beginning of it), those for which the SQL condition `where`
    holds, the `worst` ones, at most `limit` of them."""

    dataset: str = ""
    row: str = ""
    where: str = ""
    worst: int = 0
    limit: int = 0


def main_dataset(run: RunView) -> str:
    """The dataset that people come for. Raises MissingInputError for a run without rows."""
    found = next((name for name in (*_MAIN, *run.rows) if name in run.rows), None)
    if found is None:
        raise MissingInputError(
            f"{run.path} has no committed rows", "`prefpipe runs DIR` lists the runs below DIR and how far they are"
        )
    return found


def selected(run: RunView, question: Question) -> tuple[str, pl.DataFrame]:
    """The name of the dataset, and its rows that `question` asks for.

    Raises UsageError for a condition, a column or a dataset that is not there, MissingInputError for an unknown id.
    """
    if question.row and not question.dataset:
        return _found(run, question.row)
    name = question.dataset or main_dataset(run)
    frame = scan(run, name)
    if question.row:
        frame = frame.filter(_has_id(frame, question.row))
    columns = [column for column, kind in frame.collect_schema().items() if not kind.is_nested()]
    if question.where:
        with _bad_condition(question.where, columns):
            frame = frame.filter(pl.sql_expr(question.where))
    if question.worst:
        frame = frame.sort(_worst_column(run, name), nulls_last=False, maintain_order=True).head(question.worst)
    if question.limit:
        frame = frame.head(question.limit)
    with _bad_condition(question.where, columns):
        rows = frame.collect()
    if question.row and rows.is_empty():
        raise _unknown_id(run, question.row)
    return name, rows


def scan(run: RunView, dataset: str) -> pl.LazyFrame:
    """The committed rows of a dataset, of files of older versions too. Raises UsageError where there is none."""
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
    """The committed rows of a dataset as they stand in its files."""
    files = run_view.parts(run, dataset)
    return pl.concat([pl.scan_parquet(file, glob=False) for file in files], how="diagonal_relaxed")


def _with_texts(run: RunView, margins: pl.LazyFrame) -> pl.LazyFrame:
    """Margins with the conversations of their pairs, as far as the runs that hold the pairs are still there."""
    found: list[pl.LazyFrame] = []
    for place in (*run.config.get("pairs", ()), *run.config.get("eval_pairs", ())):
        with suppress(PrefpipeError, OSError, ValueError):  # a file from elsewhere, or gone
            source = run_view.view(Path(place))
            if "pairs" in source.rows:
                found.append(plain(source, "pairs").select(*_TEXTS, row_id="pair_id"))
    if not found:
        return margins
    texts = pl.concat(found, how="vertical_relaxed").unique("row_id")
    return margins.join(texts, on="row_id", how="left", maintain_order="left")


@contextmanager
def _bad_condition(condition: str, columns: list[str]) -> Generator[None]:
    """Turn what polars says to an SQL condition, when it reads or applies it, into an error."""
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


def _found(run: RunView, row: str) -> tuple[str, pl.DataFrame]:
    """The first dataset that holds an id, in the order in which people come for them, and the rows with that id."""
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
