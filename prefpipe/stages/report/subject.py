"""What a page is about: a run, the runs that it was made from, or every step of `iterate`; and numbers in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefpipe.runs import logs, overview
from prefpipe.runs.overview import Gap, Overview, Record
from prefpipe.schemas import Margin
from prefpipe.stages.report.texts import shown
from prefpipe.statistics import p_in_words

DASH = "\N{EN DASH}"
_MOST_ROUNDS = 6  # side by side in a chart
_MOST_MARGINS = 200_000


@dataclass(frozen=True)
class Subject:
    """`root` is the run that was asked for; `runs` are its steps, or the run behind those that it was made from;
    `logs` are the metrics of those that train, by path."""

    root: Overview
    runs: Sequence[Overview]
    gaps: Sequence[Gap] = ()
    logs: Mapping[Path, Sequence[Record]] = field(default_factory=dict[Path, Sequence[Record]])

    def of(self, *commands: str) -> list[Overview]:
        """The runs of these commands that were started, in order."""
        return [run for run in self.runs if run.command in commands and run.state != "not started"]

    def metrics(self, run: Overview) -> Sequence[Record]:
        """The lines of metrics.jsonl of a run of `train`, one for each step so far."""
        return [line for line in self.logs.get(run.path, ()) if isinstance(line.get("step"), int)]

    def trained(self) -> list[Overview]:
        """The newest runs of `train`, at most as many as a chart shows."""
        return self.of("train")[-_MOST_ROUNDS:]


def read(directory: Path) -> Subject:
    """The subject that a directory holds. Raises as `overview.look`."""
    root = overview.look(directory)
    if root.command == "iterate":
        runs, gaps = overview.rounds(root), root.gaps
    else:
        before, gaps = overview.sources(root)
        runs = [*reversed(before), root]
    metrics = {run.path: logs.lines(run.path / "metrics.jsonl") for run in runs if run.command == "train"}
    return Subject(root, runs, [*gaps, *(gap for run in runs for gap in run.gaps)], metrics)


def margins(run: Overview) -> Sequence[dict[str, Any]]:
    """The margins of the pairs of a run of `train`; empty while it is not complete, and for one of an older version."""
    columns = ["row_id", "held_out", "margin"]
    return overview.rows(run, "margins", Margin, _MOST_MARGINS, columns).rows


def label(run: Overview) -> str:
    """A run in a legend: its round, or its name."""
    if run.round is None:
        return shown(run.name, 120)
    return "start" if run.round == 0 else f"round {run.round}"


def number(value: object, digits: int = 3) -> str:
    """A number for people; a dash for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return DASH
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def percent(value: object) -> str:
    """A share as a percentage; a dash for anything else."""
    return f"{value:.1%}" if isinstance(value, int | float) and not isinstance(value, bool) else DASH


def p_value(value: object) -> str:
    """A p value for people; a dash for anything else."""
    return p_in_words(value) if isinstance(value, int | float) and not isinstance(value, bool) else DASH


def table(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested results as rows of a dotted name and a value in words."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += table(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for place, entry in enumerate(value):
                inner = entry if isinstance(entry, dict) else {"": entry}
                rows += [(key.rstrip("."), text) for key, text in table(inner, f"{prefix}{name}.{place}.")]
        else:
            rows.append((shown(f"{prefix}{name}", 120), _in_words(name, value)))
    return rows


def _in_words(name: str, value: object) -> str:
    if name.endswith("p_value"):
        return p_value(value)
    return number(value, 4) if isinstance(value, float) else shown(value, 300)
