"""The curves that the playground shows are those of the losses."""

import json
import os

import pytest

from prefpipe.config.losses import LOSSES
from prefpipe.stages.report import playground
from tests.conftest import ROOT
from tests.stages.report import grid

FILE = ROOT / "prefpipe" / "stages" / "report" / "curves.json"


@pytest.mark.skipif("PREFPIPE_WRITE_DOCS" not in os.environ, reason="writes curves.json")
def test_write_the_curves() -> None:
    FILE.write_text(grid.as_text(grid.grid()))


@pytest.mark.parametrize("name", LOSSES)
def test_the_curves_are_those_of_the_loss(name: str) -> None:
    """To 1e-6 of a value, or of the scale of its curve."""
    shipped, made = playground.curves()["losses"][name], grid.grid_of(name)
    assert {key: shipped[key] for key in ("beta", "settings")} == {key: made[key] for key in ("beta", "settings")}
    for which in ("loss", "pull"):
        assert len(shipped[which]) == len(made[which])
        for kept, fresh in zip(shipped[which], made[which], strict=True):
            assert kept == pytest.approx(fresh, rel=1e-6, abs=1e-6)


def test_every_loss_has_curves_over_the_same_margins() -> None:
    curves = playground.curves()
    assert list(curves["losses"]) == list(LOSSES)
    assert curves["margins"] == grid.MARGINS
    lengths = {len(c) for of in curves["losses"].values() for which in ("loss", "pull") for c in of[which]}
    assert lengths == {len(grid.MARGINS)}


def test_dpo_by_hand() -> None:
    """At h = 0: ln 2, and a pull of beta / 2."""
    of, middle = playground.curves()["losses"]["sigmoid"], grid.MARGINS.index(0)
    place = of["settings"]["beta"].index(0.1) * len(of["settings"]["label_smoothing"])
    assert of["loss"][place][middle] == pytest.approx(0.6931472)
    assert of["pull"][place][middle] == pytest.approx(0.05)
    json.dumps(of, allow_nan=False)
