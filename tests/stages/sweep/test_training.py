"""One process and its variants: those of another process are left alone, errors that concern all are raised."""

from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import IdentityError, LockedError, PrefpipeError, StorageError
from prefpipe.runs import fsio
from prefpipe.stages.sweep import training
from prefpipe.stages.sweep.training import WorkDone
from prefpipe.stages.train.inputs import prepare
from tests.stages.sweep.cases import config


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The names and the pauses of the runs that train is asked for; nothing is trained."""
    asked = list[tuple[str, int]]()

    def run(_config: Any, out: Path, **options: Any) -> None:
        with fsio.lock(out):
            asked.append((out.name, options["until"]))

    monkeypatch.setattr(training.stage, "run", run)
    return asked


def test_variants_that_share_the_base_come_first(tiny_model: Path, pairs: Path, tmp_path: Path, told: list[Any]):
    sweep = config(tiny_model, pairs, "tuning=full,lora", lora_r=16, lora_alpha=32)
    training.train(sweep.variants, tmp_path, prepare(sweep.variants[0].config), {"tuning-lora": 2})
    assert told == [("tuning-lora", 2), ("tuning-full", 0)]


def test_a_variant_of_another_process_is_left_to_it(tiny_model: Path, pairs: Path, tmp_path: Path, told: list[Any]):
    sweep = config(tiny_model, pairs, "beta=0.1,0.2")
    data = prepare(sweep.variants[0].config)
    with fsio.lock(tmp_path / "variants" / "beta-0.1"):
        training.train(sweep.variants, tmp_path, data, {}, skip_locked=True)
        assert told == [("beta-0.2", 0)]
        with pytest.raises(LockedError):
            training.train(sweep.variants, tmp_path, data, {})


def test_one_that_came_to_its_step_is_not_loaded(tiny_model: Path, pairs: Path, tmp_path: Path, told: list[Any]):
    sweep = config(tiny_model, pairs, "beta=0.1,0.2")
    (tmp_path / "variants" / "beta-0.1" / "checkpoints" / "step-00000003").mkdir(parents=True)
    training.train(sweep.variants, tmp_path, prepare(sweep.variants[0].config), {"beta-0.1": 2, "beta-0.2": 2})
    assert told == [("beta-0.2", 2)]
    place = tmp_path / "variants" / "beta-0.1"
    assert [training.has_reached(place, step) for step in (0, 2, 3, 4)] == [False, True, True, False]


@pytest.mark.parametrize("error", [StorageError, IdentityError, PrefpipeError])
def test_errors_of_all_are_raised_and_those_of_one_are_noted(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[PrefpipeError]
):
    def run(*_: Any, **__: Any) -> None:
        raise error("it broke", "")

    monkeypatch.setattr(training.stage, "run", run)
    sweep = config(tiny_model, pairs, "beta=0.1,0.2")
    data = prepare(sweep.variants[0].config)
    if error is PrefpipeError:
        done = training.train(sweep.variants, tmp_path, data, {})
        assert done.failed == {"beta-0.1": "it broke", "beta-0.2": "it broke"}
    else:
        with pytest.raises(error):
            training.train(sweep.variants, tmp_path, data, {})


def test_counts_add_up() -> None:
    done = WorkDone(1, 2, 3, 4, {"a": "x"})
    done.add(WorkDone(1, 1, 1, 1, {"b": "y"}))
    assert done == WorkDone(2, 3, 4, 5, {"a": "x", "b": "y"})
