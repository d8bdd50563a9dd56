"""The table of a sweep, the recipe of its best variant and its page."""

from pathlib import Path
from typing import Any

import pytest

from prefpipe.config import base
from prefpipe.config.grid import Variant
from prefpipe.config.train import TrainConfig
from prefpipe.stages.sweep import table
from prefpipe.stages.sweep.results import Best, Result


def row(name: str, state: str = "complete", **values: Any) -> dict[str, Any]:
    found = {k: dict(zip(("value", "low", "high"), v, strict=True)) for k, v in values.items()}
    return {"name": name, "state": state, "steps": 4, "values": found}


ROWS = [
    row("beta-0.1", accuracy=(0.75, 0.5, 0.9), loss=(0.6, None, None)),
    row("beta-<b>", accuracy=(0.5, 0.3, 0.7)),
    row("beta-9.0", "failed"),
]


def test_a_line_for_each_variant_and_a_column_for_each_number() -> None:
    head, _, *lines = table.lines(ROWS, "beta-0.1")
    assert head.split("  ")[0] == "variant"
    assert "held-out accuracy" in head
    assert lines[0].startswith("beta-0.1 (best)")
    assert "0.75 [0.5, 0.9]" in lines[0]
    assert lines[1].split()[-1] == "-"  # it has no loss
    assert lines[2].startswith("beta-9.0 (failed)")
    assert len({line.find("4") for line in lines}) == 1 or all("4" in line for line in lines)


def test_the_recipe_is_one_of_train(tmp_path: Path) -> None:
    config = TrainConfig(model="some/model", pairs=("runs/p", "b.jsonl"), beta=0.3, loss_type=("ipo",))
    found = Result(Variant("beta-0.3", {"beta": 0.3}, config), "complete", 4, values={"accuracy": (0.5, 0.4, 0.6)})
    (tmp_path / "best.toml").write_text(table.recipe(Best(found, "accuracy", ["other"]), 12))
    assert base.load(TrainConfig, tmp_path / "best.toml", {}) == config
    head = (tmp_path / "best.toml").read_text().splitlines()[:2]
    assert head[0] == "# The best of 12 variants of a sweep."
    assert "0.5 [0.4, 0.6]; not told apart from it: 1 (other)" in head[1]


def test_the_page_escapes_names_and_draws_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    table.write_page(tmp_path / "s.html", ROWS, {"name": "beta-0.1"}, "verdict & more")
    page = (tmp_path / "s.html").read_text()
    assert page.count("<svg") == 2
    assert "beta-&lt;b&gt;" in page
    assert "<b>beta" not in page
    assert "verdict &amp; more" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace('http-equiv="', "")


def test_without_the_package_that_draws_there_is_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda _name: None)
    table.write_page(tmp_path / "s.html", ROWS, {"name": "beta-0.1"}, "")
    assert not (tmp_path / "s.html").exists()
    assert "no plot: install it with" in capsys.readouterr().err


def test_the_best_comes_first_and_those_without_a_value_last() -> None:
    def result(name: str, **values: Any) -> Result:
        return Result(Variant(name, {}, TrainConfig()), "complete", 1, values=values)

    found = [result("a"), result("b", accuracy=(0.2, 0, 1)), result("c", accuracy=(0.4, 0, 1))]
    assert [r.variant.name for r in table.ordered(found, "accuracy")] == ["c", "b", "a"]
