"""benchmarks/ranks.py in one process, on a tiny model: what it counts, and that it sees weights that differ."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("ranks")


def test_phases_losses_and_weights(ranks: ModuleType, tmp_path: Path):
    for name in ("tiny", "model"):
        ranks.make(tmp_path / name, ranks.TINY)
    found: dict[str, dict[str, list[float]]] = {}
    for name, steps in (("one", 2), ("again", 2), ("longer", 3)):
        (tmp_path / name).mkdir()
        ranks.rank(tmp_path, "full", steps, tmp_path / name)
        found[name] = json.loads((tmp_path / name / "rank-0.json").read_text())
    one = found["one"]
    assert list(one["peaks"]) == list(one["seconds"]) == ["load", "self-test", "steps", "checkpoint"]
    assert one["losses"][1] < one["losses"][0]
    assert found["longer"]["losses"][:2] == pytest.approx(one["losses"], rel=1e-3)  # the schedule is another
    assert ranks.largest_difference(tmp_path / "one", tmp_path / "again") == 0
    assert 1e-5 < ranks.largest_difference(tmp_path / "longer", tmp_path / "one") < 1e-3


def test_the_worst_rank_counts(ranks: ModuleType):
    def of(load: int, save: int) -> dict[str, object]:
        return {"peaks": {"load": load, "checkpoint": save}, "seconds": {"load": 1.0}, "losses": [0.7]}

    found = ranks.summary([of(10**6, 4 * 10**6), of(3 * 10**6, 2 * 10**6)], 2)
    assert (found["load"], found["checkpoint"], found["peak"]) == (3.0, 4.0, 4.0)
    with pytest.raises(AssertionError):
        ranks.summary([of(1, 1)], 2)
