"""W&B, Trackio and MLflow as installed, offline, read back from what they keep; skipped where they are not there."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefpipe.stages.train import stage
from prefpipe.stages.train.monitor.trackers import tracking
from tests.stages.train import data

pytestmark = pytest.mark.filterwarnings("ignore")  # their own warnings are not ours to fix

RUN_ID = "f" * 32
SETTINGS = {"beta": 0.1, "pairs": ("a", "b")}
TOLD = {"beta": "0.1", "pairs": "('a', 'b')"}
# Steps 0..3, killed; the newest checkpoint is after step 2: steps 2 and 3 come again, with the same values.
SENT = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (2, 2.0), (3, 3.0), (4, 4.0)]


@pytest.fixture(scope="module")
def trackio_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trackio reads its setting when it is imported, once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trackio")
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # what tracking sets as well: so that it is undone


def send_twice(name: str, out: Path) -> None:
    """A run that is cut off and goes on."""
    for first, last in ((0, 4), (2, 5)):
        with tracking([name], out, RUN_ID, SETTINGS, first) as track:
            for step in range(first, last):
                track(step, {"train/loss": float(step)})


def test_mlflow_keeps_one_run_with_its_settings(tmp_path: Path):
    mlflow = pytest.importorskip("mlflow")
    send_twice("mlflow", tmp_path)
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.params == TOLD
    assert run.info.status == "FINISHED"
    assert sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")) == sorted(SENT)


def test_mlflow_takes_a_run_that_begins_again_with_another_budget(tmp_path: Path):
    """Killed before its first checkpoint: step 0 comes again. MLflow refuses other settings; the first ones stay."""
    mlflow = pytest.importorskip("mlflow")
    for tokens in (512, 256):
        with tracking(["mlflow"], tmp_path, RUN_ID, {"max_tokens_per_micro_batch": tokens}, 0) as track:
            track(0, {"train/loss": 0.0})
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.params == {"max_tokens_per_micro_batch": "512"}


def test_trackio_keeps_one_run_with_its_settings(
    trackio_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TRACKIO_PROJECT", "twice")
    pytest.importorskip("trackio")
    send_twice("trackio", tmp_path)
    names, sent, ((settings,),) = trackio_rows(trackio_dir / "twice.db")
    assert names == {f"{tmp_path.name}-{RUN_ID[:8]}"}
    assert [(step, values["train/loss"]) for step, values in sent] == SENT
    kept = {k: str(v) for k, v in json.loads(settings).items() if not k.startswith("_")}
    assert kept == TOLD
    assert capsys.readouterr().out == ""  # stdout is for data


def trackio_rows(path: Path) -> tuple[set[str], list[tuple[int, dict[str, float]]], list[Any]]:
    """Names of runs, (step, metrics) in the order they came, settings of every run."""
    with sqlite3.connect(path) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
        settings = base.execute("select config from configs").fetchall()
    base.close()
    return {name for name, _, _ in rows}, [(step, json.loads(values)) for _, step, values in rows], settings


def test_wandb_writes_offline_runs_of_one_id_with_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("wandb")
    send_twice("wandb", tmp_path)
    first, second = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{RUN_ID}.wandb"))
    assert wandb_history(first) + wandb_history(second) == SENT
    for file in (first, second):
        (run,) = (r.run for r in wandb_records(file) if r.WhichOneof("record_type") == "run")
        assert (run.run_id, run.project, run.display_name) == (RUN_ID, "prefpipe", f"{tmp_path.name}-{RUN_ID[:8]}")
        told = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert {k: str(v) for k, v in told.items() if not k.startswith("_")} == TOLD
    assert capsys.readouterr().out == ""


def wandb_history(file: Path) -> list[tuple[int, float]]:
    found: list[tuple[int, float]] = []
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            found.append((record.history.step.num, values["train/loss"]))
    return found


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of an offline run: seven bytes of header, then LevelDB's log format (blocks of 32 KiB; a piece is crc,
    length, kind: whole, first, middle or last)."""
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    content, place, pieces = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(pieces)
            pieces = b""


def test_a_run_of_training_sends_its_metrics_to_all(
    trackio_dir: Path, tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRACKIO_PROJECT", "training")
    names = ("mlflow", "trackio", "wandb")
    mlflow, *_ = (pytest.importorskip(name) for name in names)
    out = tmp_path / "t"
    stage.run(data.config(tiny_model, pairs, report_to=names, eval_split=0.2, eval_steps=3), out, force=False)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 3]
    client = mlflow.MlflowClient((out / "mlflow").as_uri())
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.params["learning_rate"] == "0.003"
    for name in ("loss", "rewards/chosen", "rewards/chosen/p05", "eval_loss", "eval_rewards/margins/p95"):
        group, _, rest = name.partition("_") if name.startswith("eval_") else ("train", "", name)
        kept = client.get_metric_history(run.info.run_id, f"{group}/{rest.replace('/p', '_p')}")
        assert [m.value for m in kept] == [line[name] for line in lines if name in line], name
    _, sent, _ = trackio_rows(trackio_dir / "training.db")
    assert [values["train/loss"] for _, values in sent if "train/loss" in values] == losses
    (file,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    assert wandb_history(file) == list(enumerate(losses))
