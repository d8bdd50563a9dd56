"""Drawings: no script and no colour of their own, strings escaped, means by hand."""

import math

import pytest

from prefpipe.stages.report import charts


def test_a_line_has_no_colour_of_its_own_and_its_strings_are_escaped() -> None:
    values = [{"step": i, "value": i * i, "series": "<b>&\"'", "kind": "training"} for i in range(5)]
    more = [{**row, "series": "other", "kind": "held-out"} for row in values]
    marks = [{"step": 2, "rule": "</svg><script>"}]
    svg = charts.lines([*values, *more], "step", series=charts.shades(["<b>&\"'", "other"]), marks=marks)
    assert svg.startswith('<svg aria-hidden="true" focusable="false"')
    assert "<script" not in svg
    assert svg.count("</svg>") == 1
    assert "&lt;b&gt;" in svg
    assert "var(--s0)" in svg
    assert "#" not in svg.replace("http://www.w3.org", "")


def test_the_newest_run_has_the_accent() -> None:
    assert charts.shades(["a", "b", "c"]) == {"a": "var(--s2)", "b": "var(--s1)", "c": "var(--s0)"}
    assert set(charts.shades([str(i) for i in range(9)]).values()) == {f"var(--s{i})" for i in range(5)}


def test_blocks_of_steps_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "MOST_POINTS", 2)
    rows = [{"step": i, "loss": float(i)} for i in range(4)] + [{"step": 4, "loss": math.nan, "kl": 3.0}]
    rows[1]["loss"] = math.inf
    points, size = charts.thinned(rows, ["loss", "kl"])
    assert size == 3
    assert points == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 3.0, "kl": 3.0}]


def test_few_steps_stay_as_they_are() -> None:
    assert charts.thinned([{"step": 7, "loss": 1.5}], ["loss"]) == ([{"step": 7, "loss": 1.5}], 1)
    assert charts.thinned([], ["loss"]) == ([], 1)


@pytest.mark.parametrize(("value", "is_one"), [(1, True), (0.5, True), (math.nan, False), (math.inf, False),
                                              (True, False), ("1", False), (None, False)])  # fmt: skip
def test_what_a_number_is(value: object, is_one: bool) -> None:
    assert charts.is_number(value) is is_one


def test_bars_for_counts_levels_and_dots() -> None:
    counted = charts.counts([{"label": "<0.1", "count": 3}], "nats")
    assert "&lt;0.1" in counted
    flow = charts.flow([{"level": "pairs", "part": "went on", "rows": 3, "order": 0}])
    assert "pairs" in flow
    dots = charts.scatter([{"x": 1, "y": 2, "series": "a"}] * 3, "tokens", "reward", series={"a": charts.ACCENT})
    assert dots.count('opacity="0.55"') == 3
    bars = charts.histogram([{"value": v, "series": "a"} for v in (1, 1, 2)], "gap", series={"a": charts.ACCENT})
    assert "gap" in bars
