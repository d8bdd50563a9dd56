"""benchmarks/saving.py on a tiny model: checkpoints beside training and while it waits have the same bytes."""

import importlib
from pathlib import Path

import pytest

from prefpipe import machine
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def test_both_ways_are_measured_and_have_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 40)
    saving = importlib.import_module("saving")
    saving.make(tmp_path / "model", saving.shape(2))
    for name, beside in (("waits", False), ("beside", True)):
        found = saving.train(tmp_path / "model", tmp_path / name, 3, 1, beside=beside)
        assert 0 <= found["waited_seconds"] <= found["loop_seconds"]
    assert len(saving.digests(tmp_path / "waits")) == 4
    assert saving.digests(tmp_path / "waits") == saving.digests(tmp_path / "beside")


def test_a_model_has_about_the_size_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    saving = importlib.import_module("saving")
    for wanted in (4, 20):
        saving.make(tmp_path / str(wanted), saving.shape(wanted))
        assert 0.7 * wanted < (tmp_path / str(wanted) / "model.safetensors").stat().st_size / 1e6 < 1.3 * wanted
