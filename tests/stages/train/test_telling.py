"""What a user sees of diagnostics and trackers, through the command line: alerts, strict runs, skipped rows, files."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefpipe.config.base import result_fields
from prefpipe.config.build_pairs import BuildPairsConfig
from prefpipe.errors import MissingInputError, StorageError, StrictError
from prefpipe.models import policy
from prefpipe.runs import fsio, store
from prefpipe.schemas import Pair, to_table
from prefpipe.stages.train import stage
from tests.conftest import Cli
from tests.stages.train import data
from tests.stages.train.monitor.cases import scalars

# apo_down takes probability from both sides. 24 steps of 4 pairs: W = 6, blocks of 2.
FALLING = {"loss_type": ("apo_down",), "learning_rate": 0.02, "num_train_epochs": 8, "save_steps": 5}


@pytest.fixture(scope="module")
def falling(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that takes probability from both sides."""
    out = tmp_path_factory.mktemp("falling") / "t"
    torch.set_num_threads(1)
    stage.run(data.config(tiny_model, pairs, **FALLING), out, force=False)
    return out


def alerts(out: Path) -> list[dict[str, Any]]:
    return store.read_manifest(out)["totals"]["alerts"]


def train(cli: Cli, model: Path, pairs: Path, out: Path, *flags: object) -> Any:
    return cli(
        "train", "--model", model, "--pairs", pairs, "--dtype", "float32", "--lora-r", 4, "--lora-alpha", 8,
        "--train-batch-size", 4, "--out", out, *flags,
    )  # fmt: skip


FALLING_FLAGS = ("--loss-type", "apo_down", "--learning-rate", 0.02, "--num-train-epochs", 8, "--save-steps", 5)


def test_the_manifest_holds_every_alert_with_its_advice(falling: Path):
    found = alerts(falling)
    assert {"A2", "A3"} <= {alert["rule"] for alert in found}
    (stop, *_) = [alert for alert in found if alert["rule"] == "A3"]
    assert stop["level"] == "STOP"
    assert 0 < stop["step"] < 24
    assert stop["message"]
    assert "nll" in stop["advice"]


@pytest.mark.parametrize("append", [4, 9, 17])
def test_a_resumed_run_has_the_alerts_and_metrics_of_an_uninterrupted_one(
    tiny_model: Path, pairs: Path, falling: Path, tmp_path: Path, append: int, monkeypatch: pytest.MonkeyPatch
):
    """Interrupted before, between and after the alerts; checkpoints every 5 steps, blocks of 2."""
    config = data.config(tiny_model, pairs, **FALLING)
    monkeypatch.setenv("PREFPIPE_FAULT", f"append:{fsio._passes['append'] + append}:eio")
    with pytest.raises(StorageError):
        stage.run(config, tmp_path / "t", force=False)
    monkeypatch.delenv("PREFPIPE_FAULT")
    stage.run(config, tmp_path / "t", force=False)
    assert alerts(tmp_path / "t") == alerts(falling)
    assert (tmp_path / "t" / "metrics.jsonl").read_bytes() == (falling / "metrics.jsonl").read_bytes()
    assert store.read_manifest(tmp_path / "t")["digest"] == store.read_manifest(falling)["digest"]


def test_strict_ends_with_3_and_the_last_checkpoint(cli: Cli, tiny_model: Path, pairs: Path, tmp_path: Path):
    out = tmp_path / "t"
    strict = train(cli, tiny_model, pairs, out, *FALLING_FLAGS, "--strict")
    assert strict.returncode == 3, strict.stderr
    error, hint = strict.stderr.strip().splitlines()[-2:]
    assert re.match(r"error: \[A3\] step \d+: ", error)
    assert "nll" in hint
    assert "--no-strict" in hint
    assert not (out / "manifest.json").exists()
    assert not (out / "adapter").exists()
    stop = int(error.split("step ")[1].split(":")[0])
    kept = sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").iterdir())
    assert kept == [step for step in range(5, 24, 5) if step <= stop][-2:]


def test_strict_ends_again_and_no_strict_goes_on(tiny_model: Path, pairs: Path, falling: Path, tmp_path: Path):
    """The result is that of a run that never was strict."""
    for _ in range(2):
        with pytest.raises(StrictError, match="A3"):
            stage.run(data.config(tiny_model, pairs, **FALLING, strict=True), tmp_path / "t", force=False)
    stage.run(data.config(tiny_model, pairs, **FALLING), tmp_path / "t", force=False)
    assert alerts(tmp_path / "t") == alerts(falling)
    assert store.read_manifest(tmp_path / "t")["digest"] == store.read_manifest(falling)["digest"]


def test_rows_without_a_finite_loss_end_the_run_after_three_steps_and_are_named(
    cli: Cli, tiny_model: Path, rows: list[Pair], tmp_path: Path
):
    """Weights at the edge of float32: every loss overflows."""
    bad = data.write_pairs(tmp_path / "p", [replace(row, weight=3e38) for row in rows])
    found = train(cli, tiny_model, bad, tmp_path / "t")
    assert found.returncode == 65, found.stderr
    lines = found.stderr.splitlines()
    named = {row.pair_id for row in rows for line in lines if "is skipped" in line and row.pair_id in line}
    assert len(named) == 10  # three steps of 4, 4 and 2 pairs
    assert any(line.startswith("error: [A13b] step 2: ") for line in lines)
    recorded = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    assert {row for line in recorded for row in line["skipped"]} == named
    assert not (tmp_path / "t" / "adapter").exists()


def test_tensorboard_and_the_terminal_show_the_metrics_of_metrics_jsonl(
    cli: Cli, tiny_model: Path, pairs: Path, tmp_path: Path
):
    found = train(cli, tiny_model, pairs, tmp_path / "t", "--report-to", "tensorboard")
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    shown = scalars(tmp_path / "t", "train/rewards/margins")
    assert [step for step, _ in shown] == [line["step"] for line in lines] == [0, 1, 2]
    assert [value for _, value in shown] == pytest.approx([line["rewards/margins"] for line in lines], rel=1e-6)
    assert len(scalars(tmp_path / "t", "train/rates/tokens_unique_per_second")) == 3
    last = [line for line in found.stderr.splitlines() if line.startswith("training: 3/3 steps")][-1]
    assert re.search(r"loss [\d.]+, accuracy [\d.]+, margin -?[\d.e-]+$", last)
    timing = [json.loads(line) for line in (tmp_path / "t" / "timing.jsonl").read_text().splitlines()]
    assert timing[-1]["event"] == "trained"
    assert timing[-1]["audit_seconds"] > 0
    assert timing[-1]["tokens_logical_per_second"] > timing[-1]["tokens_unique_per_second"] > 0


def test_trackers_and_strictness_are_no_other_result(tiny_model: Path):
    changed = data.config(tiny_model, report_to=("tensorboard",), strict=True)
    assert result_fields(changed) == result_fields(data.config(tiny_model))


def test_a_tracker_without_its_package_stops_before_anything_is_read(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingInputError, match="wandb"):
        stage.run(data.config(tiny_model, tmp_path / "none", report_to=("wandb",)), tmp_path / "t", force=False)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("sampled_by", ["reference", "another", "unknown"])
def test_the_divergence_is_reported_where_the_reference_sampled_the_rows(
    tiny_model: Path, rows: list[Pair], tmp_path: Path, sampled_by: str
):
    """It is the mean of ref_logps - logps over both sides; at beta 0.1 that is -(chosen + rejected reward) / 0.2."""
    base = policy.resolve(str(tiny_model)).id
    identity = {"reference": {"policies": [base]}, "another": {"policies": [base, "weights:x"]}, "unknown": {}}
    with store.open_run(tmp_path / "p", "build-pairs", BuildPairsConfig(), {"test": "1"}, force=False) as run_:
        run_.write_part("pairs", Pair, 0, to_table(Pair, rows))
        run_.finish({"pairs": len(rows)}, identity[sampled_by])
    stage.run(data.config(tiny_model, tmp_path / "p", num_train_epochs=1), tmp_path / "t", force=False)
    for line in (json.loads(text) for text in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()):
        assert ("kl/ref_policy" in line) == (sampled_by == "reference")
        if sampled_by == "reference":
            expected = -(line["rewards/chosen"] + line["rewards/rejected"]) / 0.2
            assert line["kl/ref_policy"] == pytest.approx(expected, abs=1e-5)


def test_settings_out_of_reach_are_alerts_of_step_0(tiny_model: Path, pairs: Path, tmp_path: Path):
    stage.run(data.config(tiny_model, pairs, num_train_epochs=1, beta=0.001), tmp_path / "t", force=False)
    (first, *_) = alerts(tmp_path / "t")
    assert (first["rule"], first["level"], first["step"]) == ("A16", "WARN", 0)
    assert "beta 0.001" in first["message"]


def test_a_page_is_written_at_an_evaluation_and_at_the_end(tiny_model: Path, tmp_path: Path) -> None:
    """It is there when the run is killed; it changes nothing of what the run makes."""
    rows = data.with_reference(data.bare_pairs(12), tiny_model)
    pairs = data.write_pairs(tmp_path / "p", rows)
    watched = data.config(tiny_model, pairs, eval_split=0.4, num_train_epochs=1, report=True)
    manifest = stage.run(watched, tmp_path / "watched", force=False)
    text = (tmp_path / "watched/report.html").read_text()
    assert "held-out pairs it prefers the chosen side" in text
    assert "watched is running" not in text
    plain = stage.run(watched.model_copy(update={"report": False}), tmp_path / "plain", force=False)
    assert plain["digest"] == manifest["digest"]
