"""The results of a sweep as a table of lines, a recipe of the best variant, and a page with a plot."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefpipe import __version__, extras, log
from prefpipe.config import base
from prefpipe.runs import fsio
from prefpipe.stages.sweep.results import Best, Result

COLUMNS = {  # by the name of a number, its words
    "accuracy": "held-out accuracy",
    "margin": "margin (nats)",
    "loss": "held-out loss",
    "kl_ref_policy": "KL(ref, policy)",
    "win_rate": "win rate",
    "pass": "pass",
    "length": "tokens",
}
_BARS, _HEIGHT = 320, 22  # width of a plot, height of a variant in it
Row = Mapping[str, Any]  # `Result.as_json`


def lines(variants: Sequence[Row], best: str) -> list[str]:
    """The lines of the table: a row for each variant, the best by its metric first, those without a result last."""
    names = _columns(variants)
    head = ["variant", "steps", *(COLUMNS.get(name, name) for name in names)]
    rows = [[_label(row, best), str(row["steps"]), *(_cell(row, name) for name in names)] for row in variants]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    table = [head, ["-" * width for width in widths], *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def recipe(best: Best, count: int) -> str:
    """A recipe of `train` with the settings of the best variant."""
    head = [f"# The best of {count} variants of a sweep.", f"# {best.sentence}", "# prefpipe train THIS --out DIR"]
    return "\n".join([*head, "", base.to_toml(best.result.variant.config)])


def write_page(path: Path, variants: Sequence[Row], best: Mapping[str, Any], sentence: str) -> None:
    """Write one HTML file with the plot and the table; log where the package for plots is missing."""
    if importlib.util.find_spec("vl_convert") is None:
        log.info(f"no plot: {extras.hint('report')}")
        return
    names = _columns(variants)
    environment = Environment(
        loader=PackageLoader("prefpipe.stages.sweep"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style = resources.files("prefpipe.stages.report").joinpath("templates/style.css").read_text("utf-8")
    html = environment.get_template("sweep.html.jinja").render(
        style=Markup(style),
        version=__version__,
        sentence=sentence,
        charts=[(COLUMNS.get(name, name), _chart(variants, name, best["name"])) for name in names],
        head=["steps", *(COLUMNS.get(name, name) for name in names)],
        rows=[
            (row["name"], row["name"] == best["name"], [row["steps"], *(_cell(row, name) for name in names)])
            for row in variants
        ],
    )
    fsio.write_text(path, html)


def ordered(results: Sequence[Result], metric: str) -> list[Result]:
    """Results by the metric, the highest first; those without a value last, in their order."""
    return sorted(results, key=lambda r: (metric not in r.values, -r.values[metric][0] if metric in r.values else 0.0))


def _columns(variants: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(name for row in variants for name in row["values"])
    return [*(name for name in COLUMNS if name in found), *(name for name in found if name not in COLUMNS)]


def _label(row: Row, best: str) -> str:
    notes = {"complete": " (best)" if row["name"] == best else "", "stopped": " (stopped)", "failed": " (failed)"}
    return row["name"] + notes[row["state"]]


def _cell(row: Row, name: str) -> str:
    found = row["values"].get(name)
    if found is None:
        return "-"
    shown = f"{found['value']:.4g}"
    return shown if found["low"] is None else f"{shown} [{found['low']:.3g}, {found['high']:.3g}]"


def _chart(variants: Sequence[Row], name: str, best: str) -> Markup:
    """A plot with a point and an interval for each variant, the best in the accent colour."""
    charts = importlib.import_module("prefpipe.stages.report.charts")  # it needs vl_convert
    values = [
        {"variant": row["name"], "best": row["name"] == best, **row["values"][name]}
        for row in variants
        if name in row["values"]
    ]
    colour = {"condition": {"test": "datum.best", "value": charts.ACCENT}, "value": charts.SECOND}
    y = {"field": "variant", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 420, "grid": False}}
    low, value = (
        charts.quantity(end, COLUMNS.get(name, name), scale={"zero": False, "nice": True}) for end in ("low", "value")
    )
    bars = {
        "transform": [{"filter": "isValid(datum.low)"}],
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {"x": low, "x2": {"field": "high"}, "y": y, "color": colour},
    }
    points = {"mark": {"type": "circle", "size": 70, "opacity": 1}, "encoding": {"x": value, "y": y, "color": colour}}
    return charts.draw(
        {"width": _BARS, "height": {"step": _HEIGHT}, "data": {"values": values}, "layer": [bars, points]}
    )
