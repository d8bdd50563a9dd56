"""benchmarks/scale.py: its simulated workers, and every measurement on few shards."""

import importlib
import json
import math
import os
from pathlib import Path
from types import ModuleType

import pytest

from prefpipe import engines
from prefpipe.inference import filling
from tests.conftest import ROOT


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("scale")
    monkeypatch.setattr(module, "SHARD_ROWS", 4)
    monkeypatch.setattr(module, "SHARD_S", 0.02)
    monkeypatch.setattr(module, "BUSY_BYTES", 8)
    return module


def test_simulated_workers_take_their_time_and_every_shard_is_committed(scale: ModuleType, tmp_path: Path) -> None:
    """Two workers that need 20 ms for 4 prompts x 8 give at most 3,200 completions a second."""
    found = scale.simulated(tmp_path, 2, 6)
    assert 0 < found["rate"] <= 2 * 4 * 8 / 0.02
    assert found["cpu"] > 0
    assert 10 < found["syncs"] <= 20  # five files and their records, and ten folders for the shards of one moment


def test_a_shard_costs_less_to_carry_than_to_make(scale: ModuleType, tmp_path: Path) -> None:
    assert 0 < scale.overhead(tmp_path)["share"] < 1


@pytest.mark.slow
def test_every_figure_is_measured_and_drawn(scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and with few prompts, so that only names and shapes mean something."""
    monkeypatch.setattr(scale, "in_process", lambda name, folder, *a: scale.worker(name, folder, *map(str, a)))
    monkeypatch.setattr(scale, "WORKERS", (1, 2))
    monkeypatch.setattr(filling, "write", filling.write)  # the benchmark replaces both
    monkeypatch.setitem(engines.ENGINES, "fake", engines.ENGINES["fake"])
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}")
    figures = [{"name": name, "figure": figure} for name, figure, *_ in scale.measure(tmp_path, quick=True)]
    assert len(figures) == 3 + 3 * 2
    assert all(math.isfinite(f["figure"]) and f["figure"] > 0 for f in figures), json.dumps(figures)
    pytest.importorskip("vl_convert")
    scale.plot(figures, tmp_path / "p.svg")
    assert "limit of one driver" in (tmp_path / "p.svg").read_text()
