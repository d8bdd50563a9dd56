"""Trackers: TensorBoard for real, read back from its event files; the others at the seam, with their settings, and in
test_real_trackers."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerated

from prefpipe.errors import MissingInputError
from prefpipe.stages.train.monitor import trackers
from prefpipe.stages.train.monitor.trackers import check_installed, tracking
from tests.stages.train.monitor.cases import scalars


def test_tensorboard_gets_every_step_and_a_resumed_run_replaces_what_it_repeats(tmp_path: Path):
    """Steps 0..4, killed; the newest checkpoint is after step 3: steps 3 and 4 come again, with other values here."""
    with tracking(["tensorboard"], tmp_path, "f" * 32, {"beta": 0.1, "pairs": ("a", "b")}, 0) as track:
        for step in range(5):
            track(step, {"train/loss": float(step)})
    with tracking(["tensorboard"], tmp_path, "f" * 32, {"beta": 0.1}, 3) as track:
        for step in range(3, 6):
            track(step, {"train/loss": 10.0 + step})
    assert scalars(tmp_path, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]


def test_no_tracker_takes_no_time_and_no_file(tmp_path: Path):
    with tracking([], tmp_path, "f", {}, 0) as track:
        track(0, {"train/loss": 1.0})
    assert list(tmp_path.iterdir()) == []


class Fake:
    """Takes what accelerate's trackers take, and remembers it."""

    made: list["Fake"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs, self.calls = args, kwargs, list[Any]()
        type(self).made.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("config", values))

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    Fake.made = []
    for name in ("WandBTracker", "TrackioTracker", "MLflowTracker"):
        assert hasattr(accelerated, name)
        monkeypatch.setattr(accelerated, name, Fake)
    monkeypatch.setattr(trackers, "_mlflow_run", lambda out, name: None)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return Fake.made


def test_settings_once_steps_in_order_and_the_end(fakes: list[Fake], tmp_path: Path):
    with tracking(["wandb", "trackio", "mlflow"], tmp_path, "f" * 32, {"beta": 0.1, "pairs": ("a",)}, 0) as track:
        track(0, {"train/loss": 0.5})
    told = {"beta": 0.1, "pairs": "('a',)"}
    wandb, trackio, mlflow = fakes
    assert wandb.calls == trackio.calls == ["start", (0, {"train/loss": 0.5}), "finish"]
    assert wandb.kwargs["config"] == trackio.kwargs["config"] == told
    assert mlflow.calls == ["start", ("config", told), (0, {"train/loss": 0.5}), "finish"]


def test_mlflow_is_not_told_settings_twice(fakes: list[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "_mlflow_run", lambda out, name: "known")
    with tracking(["mlflow"], tmp_path, "f" * 32, {"beta": 0.1}, 0):
        pass
    assert fakes[0].calls == ["start", "finish"]
    assert fakes[0].kwargs["run_id"] == "known"


def test_no_metric_of_mlflow_is_the_folder_of_another(fakes: list[Fake], tmp_path: Path):
    """Its files: train/rewards/chosen cannot be a file and hold p05."""
    with tracking(["mlflow", "trackio"], tmp_path, "f" * 32, {}, 0) as track:
        track(0, {"train/loss": 1.0, "train/rewards/chosen": 2.0, "train/rewards/chosen/p05": 3.0})
    mlflow, trackio = fakes
    assert mlflow.calls[2] == (0, {"train/loss": 1.0, "train/rewards/chosen": 2.0, "train/rewards/chosen_p05": 3.0})
    assert "train/rewards/chosen/p05" in trackio.calls[1][1]


def test_a_resumed_run_goes_on_in_the_same_run_with_the_same_settings(fakes: list[Fake], tmp_path: Path):
    for first in (0, 3):
        with tracking(["wandb", "trackio"], tmp_path, "f" * 32, {"beta": 0.1}, first):
            pass
    before, _, after, other = fakes
    assert (after.args, after.kwargs) == (before.args, before.kwargs)
    assert after.kwargs["id"] == "f" * 32
    assert after.kwargs["resume"] == other.kwargs["resume"] == "allow"
    assert after.calls == other.calls == ["start", "finish"]


def test_wandb_is_offline_unless_its_own_setting_says_otherwise(
    fakes: list[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trackers.make("wandb", tmp_path, "f", 0, {})
    monkeypatch.setenv("WANDB_MODE", "online")
    trackers.make("wandb", tmp_path, "f", 0, {})
    assert [fake.kwargs["mode"] for fake in fakes] == ["offline", "online"]
    assert fakes[0].kwargs["dir"] == str(tmp_path)


def test_trackers_are_closed_after_an_error(fakes: list[Fake], tmp_path: Path):
    with pytest.raises(ZeroDivisionError), tracking(["wandb", "mlflow"], tmp_path, "f", {}, 3):
        raise ZeroDivisionError
    assert [fake.calls[-1] for fake in fakes] == ["finish", "finish"]


@pytest.mark.parametrize(("name", "line"), [("wandb", "pip install wandb"), ("mlflow", "pip install mlflow-skinny")])
def test_a_missing_package_is_named_with_its_install_line(name: str, line: str, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else real(wanted))
    check_installed(["tensorboard"])
    with pytest.raises(MissingInputError, match=name) as caught:
        check_installed(["tensorboard", name])
    assert caught.value.exit_code == 66
    assert line in caught.value.hint
