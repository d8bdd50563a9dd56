"""Charts as SVG, drawn by Vega-Lite when the page is written: the page needs no script for them.

Colours are names of the variables of the page's style sheet, so that one drawing serves light, dark and print.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import vl_convert
from markupsafe import Markup

Values = Sequence[Mapping[str, Any]]
Spec = dict[str, Any]
WIDTH, HEIGHT = 300, 150
MOST_POINTS = 150  # of a line
_FEW = 24  # points that are marked
ACCENT, SECOND, MUTED, BAD = "var(--accent)", "var(--second)", "var(--muted)", "var(--bad)"
SIDES = {"chosen": ACCENT, "rejected": SECOND}
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_FONT = "system-ui, sans-serif"
_CONFIG: Spec = {
    "aria": False,
    "background": None,
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "grid": False,
        "labelColor": MUTED,
        "titleColor": MUTED,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelPadding": 6,
    },
    "axisY": {"grid": True, "gridColor": "var(--line)", "tickCount": 4},
    "axisX": {"tickCount": 5, "labelOverlap": "greedy", "labelSeparation": 10},
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": MUTED,
        "labelFontSize": 11,
        "symbolStrokeWidth": 2,
        "offset": 4,
        "symbolSize": 60,
    },
}


@dataclass(frozen=True)
class Chart:
    """A drawing with its title, a sentence that says what it shows, for those who do not see it too, and what one
    should expect of it."""

    title: str
    says: str
    svg: Markup
    expected: str = ""


def draw(spec: Spec) -> Markup:
    """The SVG of a Vega-Lite spec; strings of its data are escaped by Vega."""
    svg = vl_convert.vegalite_to_svg({"$schema": _SCHEMA, "config": _CONFIG, **spec})
    head = svg.index(">")
    return Markup('<svg aria-hidden="true" focusable="false"' + svg[len("<svg") : head] + svg[head:])


def lines(values: Values, x: str, *, series: Mapping[str, str], band: Values = (), marks: Values = ()) -> Markup:
    """Lines of rows {x, "value", "series", "kind"}, with the band of rows {x, "low", "high"} behind and red rules at
    the rows {x, "rule"}. `kind` is "training" or "held-out", which is dashed."""
    scale: Spec = {"zero": False, "nice": True}
    y = quantity("value", None, scale=scale, axis={"format": ".4~g"})
    kinds = sorted({str(row["kind"]) for row in values}, reverse=True)
    line: Spec = {
        "data": {"values": list(values)},
        "mark": {"type": "line", "strokeWidth": 1.8, "strokeJoin": "round"},
        "encoding": {
            "x": _axis(x),
            "y": y,
            "color": _colours(series),
            "strokeDash": {
                "field": "kind",
                "type": "nominal",
                "scale": {"domain": ["training", "held-out"], "range": [[1, 0], [4, 3]]},
                "legend": {"symbolStrokeColor": MUTED, "values": kinds} if len(kinds) > 1 else None,
            },
        },
    }
    layers: list[Spec] = []
    if band:
        extent = quantity("low", None, scale=scale)
        layers.append(
            {
                "data": {"values": list(band)},
                "mark": {"type": "area", "color": ACCENT, "opacity": 0.16},
                "encoding": {"x": _axis(x), "y": extent, "y2": {"field": "high"}},
            }
        )
    layers.append(line)
    if few := [row for row in values if row["kind"] == "held-out"][:_FEW]:  # a line of one point cannot be seen
        dots = {"data": {"values": few}, "mark": {"type": "circle", "size": 22, "opacity": 1}}
        layers.append({**dots, "encoding": {"x": _axis(x), "y": y, "color": _colours(series)}})
    if marks:
        layers += _rules(marks, x)
    return draw({"width": WIDTH, "height": HEIGHT, "layer": layers})


def plot(values: Values, mark: Spec, encoding: Spec, size: tuple[Any, Any] = (WIDTH, HEIGHT)) -> Markup:
    """Marks of one kind for rows."""
    width, height = size
    data = {"values": list(values)}
    return draw({"width": width, "height": height, "data": data, "mark": mark, "encoding": encoding})


def quantity(field: str, title: str | None, **more: Any) -> Spec:
    """The encoding of a number of the rows."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def histogram(
    values: Values,
    title: str,
    *,
    series: Mapping[str, str],
    domain: tuple[float, float] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Markup:
    """A histogram of rows {"value", "series"}; several series lie over each other."""
    binned: Spec = {"maxbins": 30, **({"extent": domain, "step": (domain[1] - domain[0]) / 40} if domain else {})}
    scale: Spec = {"scale": {"domain": domain}, "axis": {"values": [domain[0], 0, domain[1]]}} if domain else {}
    mark = {"type": "bar", "opacity": 0.75 if len(series) == 1 else 0.55, "binSpacing": 1}
    x = {"field": "value", "type": "quantitative", "bin": binned, "title": title, **scale}
    y = {"aggregate": "count", "title": None, "stack": None}
    return plot(values, mark, {"x": x, "y": y, "color": _colours(series)}, size)


def counts(values: Values, title: str) -> Markup:
    """Bars of counted rows {"label", "count"}, in their order."""
    x = {"field": "label", "type": "ordinal", "sort": None, "title": title, "axis": {"labelAngle": 0}}
    mark = {"type": "bar", "color": ACCENT, "opacity": 0.75}
    return plot(values, mark, {"x": x, "y": quantity("count", None)})


def scatter(values: Values, x_title: str, y_title: str, *, series: Mapping[str, str]) -> Markup:
    """Points of rows {"x", "y", "series"}."""
    x, y = (quantity(name, title, scale={"zero": False}) for name, title in (("x", x_title), ("y", y_title)))
    return plot(values, {"type": "circle", "size": 22, "opacity": 0.55}, {"x": x, "y": y, "color": _colours(series)})


def flow(values: Values) -> Markup:
    """One bar for each level, cut into rows that went on and rows that did not: {"level", "part", "rows", "order"}."""
    levels = list(dict.fromkeys(str(row["level"]) for row in values))
    axis = {"labelLimit": 220, "grid": False, "minExtent": 110}
    colour = {"domain": ["went on", "left out"], "range": [ACCENT, "var(--bad-soft)"]}
    encoding = {
        "y": {"field": "level", "type": "nominal", "sort": levels, "title": None, "axis": axis},
        "x": quantity("rows", "rows", axis={"format": "~s"}),
        "color": {"field": "part", "type": "nominal", "scale": colour},
        "order": {"field": "order", "type": "quantitative"},
    }
    return plot(values, {"type": "bar", "height": 14, "cornerRadius": 2}, encoding, (320, {"step": 26}))


def graph(nodes: Values, edges: Values, columns: Sequence[str], rows: Sequence[str]) -> Markup:
    """Nodes {"column", "row", "state"} on a grid of columns and rows, and edges {"column", "row", "to_column",
    "to_row"}. A single column has no name."""
    head: Spec | None = {"orient": "top", "labelAngle": 0} if len(columns) > 1 else None
    x, y = (
        {"field": name, "type": "ordinal", "scale": {"type": "point", "domain": order}, "title": None, "axis": axis}
        for name, order, axis in (("column", columns, head), ("row", rows, {"grid": False}))
    )
    line = {"x2": {"field": "to_column"}, "y2": {"field": "to_row"}}
    states = {"domain": ["complete", "running", "unfinished"], "range": [ACCENT, SECOND, BAD]}
    colour = {"field": "state", "type": "nominal", "scale": states, "legend": None}
    rules = {
        "data": {"values": list(edges)},
        "mark": {"type": "rule", "color": "var(--s3)", "strokeWidth": 1.5},
        "encoding": {"x": x, "y": y, **line},
    }
    circles = {
        "data": {"values": list(nodes)},
        "mark": {"type": "circle", "size": 110, "opacity": 1},
        "encoding": {"x": x, "y": y, "color": colour},
    }
    return draw({"width": {"step": 76}, "height": {"step": 36}, "layer": [rules, circles]})


def thinned(rows: Values, names: Sequence[str], x: str = "step") -> tuple[list[dict[str, Any]], int]:
    """Means of the numbers under `names` over blocks of rows, at most MOST_POINTS blocks, each at the x of its last
    row; and the rows in a block. A name that no row of a block has is left out there."""
    size = -(-len(rows) // MOST_POINTS) or 1
    found: list[dict[str, Any]] = []
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        point: dict[str, Any] = {x: block[-1][x]}
        for name in names:
            known = [row[name] for row in block if is_number(row.get(name))]
            if known:
                point[name] = sum(known) / len(known)
        found.append(point)
    return found, size


def is_number(value: object) -> bool:
    """Whether a value of a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def shades(names: Sequence[str]) -> dict[str, str]:
    """Colours of runs in order: the last one in the accent, and those before it ever paler."""
    last = len(names) - 1
    return {name: f"var(--s{min(last - place, 4)})" for place, name in enumerate(names)}


def _axis(name: str) -> Spec:
    return quantity(name, name, axis={"format": "~s"}, scale={"nice": False})


def _colours(series: Mapping[str, str]) -> Spec:
    return {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": list(series), "range": list(series.values())},
        "legend": {} if len(series) > 1 else None,
    }


def _rules(marks: Values, x: str) -> list[Spec]:
    data = {"values": list(marks)}
    place = _axis(x)
    return [
        {"data": data, "mark": {"type": "rule", "color": BAD, "strokeDash": [2, 2]}, "encoding": {"x": place}},
        {
            "data": data,
            "mark": {"type": "text", "color": BAD, "fontSize": 10, "align": "left", "dx": 3, "baseline": "top", "y": 0},
            "encoding": {"x": place, "text": {"field": "rule"}},
        },
    ]
