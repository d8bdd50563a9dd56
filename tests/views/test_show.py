"""What `show` says of the ledger, of runs inside a run, and of rows."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rich.console import RenderableType

from prefpipe.errors import MissingInputError
from prefpipe.views import drawing, show
from prefpipe.views.rows import RowQuery

Drawn = Callable[[Iterable[RenderableType]], str]


@pytest.fixture
def drawn(capsys: pytest.CaptureFixture[str]) -> Drawn:
    def draw(parts: Iterable[RenderableType]) -> str:
        drawing.show(*parts)
        return capsys.readouterr().out

    return draw


def test_what_a_run_cost_is_shown(runs: Path, drawn: Drawn) -> None:
    assert re.search(r"cost +\d+\.\d s, [\d,]+ tokens/s, \d+\.\d\d GiB of memory", drawn(show.overview(runs / "g")))
    assert re.search(r"cost +not noted", drawn(show.overview(runs / "p")))
    timing = json.loads(show.overview_json(runs / "g"))["timing"]
    assert (timing["event"], timing["peak_memory_gib"] > 0) == ("sampled", True)
    assert json.loads(show.overview_json(runs / "p"))["timing"] == {}


def test_the_ledger_is_shown_by_reason(runs: Path, drawn: Drawn) -> None:
    shown = drawn(show.overview(runs / "p"))
    assert "Rows that did not go on" in shown
    assert " tie " in shown


def test_runs_inside_are_listed(runs: Path, tmp_path: Path, drawn: Drawn) -> None:
    shutil.copytree(runs / "p", tmp_path / "p")
    shutil.copytree(runs / "g", tmp_path / "p/round-1/g")
    assert "round-1/g" in drawn(show.overview(tmp_path / "p"))


def test_without_a_limit_twenty_rows_are_shown_and_the_rest_is_counted(runs: Path, drawn: Drawn) -> None:
    shown = drawn(show.of_rows(runs / "e", RowQuery(dataset="evaluations", where="round = 0")))
    assert "18 of 18 matching rows" in shown
    every = list(show.rows_json(runs / "g", RowQuery(dataset="ref_logps")))
    assert len(every) == 18
    assert json.loads(every[0])["token_logps"]


def test_a_run_without_rows_is_said(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "p", tmp_path / "p", ignore=shutil.ignore_patterns("pairs", "dropped*", "manifest.json"))
    with pytest.raises(MissingInputError, match="no committed rows"):
        list(show.of_rows(tmp_path / "p", RowQuery(limit=1)))
