"""benchmarks/step_profile.py on a tiny model: every operation has a kind, and the kinds make up the pass."""

import importlib
from pathlib import Path

import pytest

from tests.conftest import ROOT


def test_a_step_is_cut_into_kinds_of_operations(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    profile = importlib.import_module("step_profile")
    found = profile.measure(str(tiny_model), "float32", 12, 5, 2, 1)
    assert set(found["CPU seconds"]) == {"reference", "step", "bare"}
    for name in ("reference pass", "step"):
        assert sum(found[name].values()) == pytest.approx(1)
        assert all(found[name][kind] > 0 for kind in (profile.PRODUCTS, profile.ATTENTION, profile.COPIES))
