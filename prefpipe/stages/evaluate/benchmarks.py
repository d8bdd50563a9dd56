"""Results of lm-evaluation-harness beside an evaluation: whatever `lm_eval --output_path OUT/lm-eval` wrote."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefpipe import reading
from prefpipe.errors import DataError
from prefpipe.statistics import Z

_FOLDER = "lm-eval"
_MOST_BYTES = 64 << 20
_ERROR = "_stderr"


def identity(out: Path) -> dict[str, str]:
    """The digest of every file of results of a run, by name."""
    return {f"{_FOLDER} {path.relative_to(out)}": reading.file_digest(path) for path in _files(out)}


def totals(out: Path) -> list[dict[str, Any]]:
    """Every number of every task, with its interval where the harness gives a standard error.

    A later file (they are named by their time) replaces numbers of an earlier one. Raises DataError for a file that
    holds no results.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in _files(out):
        content = reading.read_json(path, _MOST_BYTES)
        results = content.get("results") if isinstance(content, dict) else None
        if not isinstance(results, dict) or not all(isinstance(numbers, dict) for numbers in results.values()):
            raise DataError(f"{path} holds no results of lm-eval", f"only its results_*.json belong into {_FOLDER}/")
        found |= {(task, metric): entry for task in results for metric, entry in _numbers(task, results[task])}
    return list(found.values())


def _numbers(task: str, numbers: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(metric, entry of the totals) of a task. A name such as `acc,none` is a metric and a filter of answers."""
    for name, value in numbers.items():
        metric, comma, kept = name.partition(",")
        if not comma or metric.endswith(_ERROR) or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        label = metric if kept == "none" else f"{metric} ({kept})"
        error = numbers.get(f"{metric}{_ERROR},{kept}")
        ends = {"low": value - Z * error, "high": value + Z * error} if isinstance(error, int | float) else {}
        yield label, {"task": task, "metric": label, "value": value, **ends}


def _files(out: Path) -> list[Path]:
    return sorted((out / _FOLDER).rglob("results*.json"), key=lambda path: (path.name, path))
