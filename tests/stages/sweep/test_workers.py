"""Variants side by side: two processes on CPUs make the runs of one, and each variant once."""

import json
from pathlib import Path

import pytest

from prefpipe import machine
from prefpipe.errors import PrefpipeError, UsageError
from prefpipe.stages.sweep import stage, workers
from tests.stages.sweep.cases import config, contents, times
from tests.stages.train import data


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_make_what_one_makes(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that fails is named as in one process; the same command then has nothing left to do."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    grid = ("beta=0.1,0.3", "lora_target_modules=q_proj,no_such")
    both = config(tiny_model, pairs, *grid, workers=2)
    manifest = stage.run(both, tmp_path / "two", force=False)
    alone = stage.run(config(tiny_model, pairs, *grid, workers=1), tmp_path / "one", force=False)
    assert manifest["digest"] == alone["digest"]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert [r["state"] for r in manifest["totals"]["variants"]].count("failed") == 2
    assert 1 <= times(tmp_path / "two")["loads"] <= 4
    assert stage.run(both, tmp_path / "two", force=False) == manifest


@pytest.mark.process
def test_the_error_of_a_process_is_the_error_of_the_sweep(tiny_model: Path, tmp_path: Path):
    """Values of another model: every process would meet them."""
    wrong = [data.with_values(row, [-1.0] * len(row.chosen_token_ids), [-9.0] * len(row.rejected_token_ids),
             "weights:other", "forward-2/float32") for row in data.bare_pairs(6)]  # fmt: skip
    (tmp_path / "s").mkdir()
    sweep = config(tiny_model, data.write_pairs(tmp_path / "p", wrong), "beta=0.1,0.3")
    (tmp_path / "s" / "config.json").write_text(json.dumps({"config": json.loads(sweep.model_dump_json())}))
    with pytest.raises(PrefpipeError, match="ended with exit code 76") as error:
        workers.run(tmp_path / "s", {"beta-0.1": 0, "beta-0.3": 0}, 2)
    assert error.value.exit_code == 76


def test_as_many_as_there_are_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda: ("0", "1", "2"))
    assert [workers.count("auto", 12), workers.count("auto", 2), workers.count(2, 12)] == [3, 2, 2]
    with pytest.raises(UsageError, match="workers = 4, and 3 GPUs are visible"):
        workers.count(4, 12)
    monkeypatch.setattr(machine, "visible_gpus", lambda: ())
    assert [workers.count("auto", 12), workers.count(5, 12), workers.count(5, 2)] == [1, 5, 2]


def test_rows_are_read_by_a_variant_that_needs_the_reference(tiny_model: Path, pairs: Path):
    sweep = config(tiny_model, pairs, "loss_type=simpo,sigmoid", beta=0.5)
    assert workers.variant_for_rows(sweep.variants).name == "loss_type-sigmoid"
    assert workers.variant_for_rows(sweep.variants[:1]).name == "loss_type-simpo"
