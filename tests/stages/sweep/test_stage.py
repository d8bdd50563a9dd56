"""A sweep makes the runs that train makes alone, once each, on one base model; killed anywhere it goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from prefpipe.config import base
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, Interrupted, PrefpipeError, UsageError
from prefpipe.runs import overview, store
from prefpipe.stages.report import stage as report
from prefpipe.stages.sweep import stage, training
from prefpipe.stages.train import loading
from prefpipe.stages.train import stage as train
from tests.stages.sweep.cases import config, contents, times
from tests.stages.train import data

GRID = ("beta=0.05,0.5", "loss_type=sigmoid,ipo")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four variants that nothing disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("swept") / "s"
    stage.run(config(tiny_model, pairs, *GRID), out, force=False)
    torch.set_num_threads(threads)
    return out


def test_every_variant_is_the_run_of_train_to_the_byte(tiny_model: Path, pairs: Path, swept: Path, tmp_path: Path):
    variants = config(tiny_model, pairs, *GRID).variants
    assert [p.name for p in sorted((swept / "variants").iterdir())] == sorted(v.name for v in variants)
    for variant in variants[1:3]:
        train.run(variant.config, tmp_path / variant.name, force=False)
        ours, theirs = swept / "variants" / variant.name, tmp_path / variant.name
        assert contents(ours) == contents(theirs)
        assert store.read_manifest(ours) == store.read_manifest(theirs)
    first, *others = (contents(swept / "variants" / v.name) for v in variants)
    assert all(first["adapter/adapter_model.safetensors"] != o["adapter/adapter_model.safetensors"] for o in others)


def test_one_load_one_audit_one_probe_and_no_reference_pass(swept: Path):
    counted = times(swept)
    assert (counted["loads"], counted["audits"], counted["probes"], counted["reference_passes"]) == (1, 1, 1, 0)


def test_it_ends_with_a_table_a_plot_and_a_recipe(tiny_model: Path, swept: Path, tmp_path: Path):
    manifest = store.read_manifest(swept)
    totals, best = manifest["totals"], manifest["totals"]["best"]
    assert json.loads((swept / "sweep.json").read_text())["variants"] == totals["variants"]
    values = {row["name"]: row["values"] for row in totals["variants"]}
    assert best["value"] == max(v["accuracy"]["value"] for v in values.values())
    assert best["low"] < best["value"] < best["high"]
    for name, numbers in values.items():
        line = json.loads((swept / "variants" / name / "metrics.jsonl").read_text().splitlines()[-1])
        beta = float(name.partition("__")[0].removeprefix("beta-"))
        assert numbers["accuracy"]["value"] == pytest.approx(line["eval_rewards/accuracies"])
        assert numbers["margin"]["value"] * beta == pytest.approx(line["eval_rewards/margins"], rel=1e-5)
        assert numbers["loss"]["value"] == line["eval_loss"]
    measures = pl.read_parquet(swept / "measures" / "part-00000.parquet")
    assert set(measures["of"]) == set(values)
    assert {"accuracy", "margin", "loss"} <= set(measures["name"])
    shown = "\n".join(stage.summary(manifest, swept))
    assert "held-out accuracy" in shown
    assert totals["verdict"] in shown
    page = (swept / "sweep.html").read_text()
    assert page.count("<svg") == len(set(measures["name"]))
    assert "<script" not in page
    again = base.load(TrainConfig, swept / "best.toml", {})
    assert base.result_fields(again) == base.result_fields(
        base.load(TrainConfig, swept / "variants" / best["name"] / "config.json", {})
    )
    assert (swept / "best" / "adapter_model.safetensors").samefile(
        swept / "variants" / best["name"] / "adapter" / "adapter_model.safetensors"
    )


def test_others_read_a_variant_as_any_run(swept: Path, tmp_path: Path):
    place = next((swept / "variants").iterdir())
    assert overview.look(place).command == "train"
    assert report.run(place, tmp_path / "page.html").stat().st_size > 10_000
    assert report.run(swept, tmp_path / "sweep.html").stat().st_size > 10_000


def test_a_complete_sweep_stays_as_it_is(
    tiny_model: Path, pairs: Path, swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(training, "train", None)
    before = store.read_manifest(swept)
    assert stage.run(config(tiny_model, pairs, *GRID), swept, force=False) == before
    assert "is complete already" in capsys.readouterr().err
    with pytest.raises(UsageError, match="belongs to another run: train_batch_size"):
        stage.run(config(tiny_model, pairs, *GRID, train_batch_size=2), swept, force=False)


def interrupt(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """Let a signal stop the training in the middle of variant `allowed` + 1."""
    told, seen = train.run, list[int]()

    def run(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) > allowed:
            options["until"] = 1
        try:
            return told(*arguments, **options)
        except training.Paused:
            raise Interrupted(15) from None

    monkeypatch.setattr(training.stage, "run", run)


def test_killed_between_and_within_variants_it_ends_the_same(
    tiny_model: Path, pairs: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings, out = config(tiny_model, pairs, *GRID), tmp_path / "s"
    with monkeypatch.context() as stopping:
        interrupt(stopping, 2)
        with pytest.raises(Interrupted):
            stage.run(settings, out, force=False)
    whole = [p.parent for p in out.glob("variants/*/manifest.json")]
    assert len(whole) == 2
    files = [p for place in whole for p in place.rglob("*") if p.is_file() and p.name not in (".owner", ".lock")]
    before = [p.stat().st_mtime_ns for p in files]
    stage.run(settings, out, force=False)
    assert [p.stat().st_mtime_ns for p in files] == before
    assert contents(out) == contents(swept)
    ours, theirs = store.read_manifest(out), store.read_manifest(swept)
    assert ours["digest"] == theirs["digest"]
    assert times(out)["loads"] == 1


def test_a_wider_grid_goes_on_a_damaged_variant_is_made_again_and_a_narrower_grid_names_the_rest(
    tiny_model: Path, pairs: Path, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "s"
    shutil.copytree(swept, out, symlinks=True)
    names = sorted(p.name for p in (out / "variants").iterdir())
    (out / "variants" / names[0] / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    wider = config(tiny_model, pairs, "beta=0.05,0.5,5", GRID[1])
    manifest = stage.run(wider, out, force=False)
    assert len(manifest["totals"]["variants"]) == 6
    assert contents(out / "variants" / names[0]) == contents(swept / "variants" / names[0])
    assert json.loads((out / "config.json").read_text())["config"]["grid"] == ["beta=0.05,0.5,5", GRID[1]]
    assert "not compared" not in capsys.readouterr().err
    stage.run(config(tiny_model, pairs, "beta=0.05", "loss_type=ipo"), out, force=False)
    told = next(line for line in capsys.readouterr().err.splitlines() if "are not compared" in line)
    assert told.count("beta-") == 5


def test_rows_without_values_are_scored_once(tiny_model: Path, tmp_path: Path):
    """The reference pass of the first variant serves the others, also when they come in another process."""
    bare = data.write_pairs(tmp_path / "p", data.bare_pairs(12, num_prompts=6))
    out = tmp_path / "s"
    stage.run(config(tiny_model, bare, "beta=0.1,0.5"), out, force=False)
    assert times(out)["reference_passes"] == 1
    stage.run(config(tiny_model, bare, "beta=0.1,0.5,0.9"), out, force=False)
    assert times(out)["reference_passes"] == 0
    kept = [contents(p)["ref_logps/part-00000.parquet"] for p in (out / "variants").iterdir()]
    assert len(kept) == 3
    assert len(set(kept)) == 1
    alone = config(tiny_model, bare, "beta=0.9").variants[0].config
    train.run(alone, tmp_path / "alone", force=False)
    assert contents(out / "variants" / "beta-0.9") == contents(tmp_path / "alone")


def test_halving_stops_the_worse_half_and_goes_on_with_the_rest(tiny_model: Path, pairs: Path, tmp_path: Path):
    """The variants that go on are those of train without a pause; the others have a checkpoint and a note."""
    settings = config(
        tiny_model, pairs, "learning_rate=0,0.003,0.03,0.3", "beta=0.1", metric_for_best_variant="margin",
        halving=(0.4,), train_batch_size=2, weight_decay=0.0,
    )  # fmt: skip
    manifest = stage.run(settings, tmp_path / "s", force=False)
    states = {row["name"]: (row["state"], row["steps"]) for row in manifest["totals"]["variants"]}
    assert sorted(state for state, _ in states.values()) == ["complete", "complete", "stopped", "stopped"]
    steps = {steps for state, steps in states.values() if state == "stopped"}
    assert len(steps) == 1
    stopped = next(name for name, (state, _) in states.items() if state == "stopped")
    assert (tmp_path / "s" / "variants" / stopped / "checkpoints" / f"step-{min(steps):08d}").is_dir()
    assert min(steps) < max(steps for _, steps in states.values())
    name = manifest["totals"]["best"]["name"]
    chosen = next(v.config for v in settings.resolved_variants if v.name == name)
    train.run(chosen, tmp_path / "alone", force=False)
    assert contents(tmp_path / "s" / "variants" / name) == contents(tmp_path / "alone")
    assert times(tmp_path / "s")["loads"] == 2  # one for each rung
    again = stage.run(settings, tmp_path / "s", force=False)
    assert again == manifest


def test_a_variant_that_fails_is_named_and_the_others_go_on(tiny_model: Path, pairs: Path, tmp_path: Path):
    manifest = stage.run(
        config(tiny_model, pairs, "lora_target_modules=q_proj,no_such_module"), tmp_path / "s", force=False
    )
    states = {row["name"]: row["state"] for row in manifest["totals"]["variants"]}
    assert states == {"lora_target_modules-q_proj": "complete", "lora_target_modules-no_such_module": "failed"}
    assert "no_such_module" in next(r["why"] for r in manifest["totals"]["variants"] if r["state"] == "failed")
    with pytest.raises(DataError, match="no_such_module"):
        stage.run(
            config(tiny_model, pairs, "lora_target_modules=no_such_module", halving=(0.5,), workers=2),
            tmp_path / "none", force=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": ()}, "no grid given"),
        ({"eval_split": 0.0, "eval_steps": 50}, "needs held-out rows"),
        ({"metric_for_best_variant": "win_rate"}, "comes from evaluate"),
        ({"halving": (0.5,), "eval_steps": 50}, "compares after steps"),
        ({"grid": ("train_order=shuffled,hardness", "loss_type=soft")}, "preference_prob"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
):
    monkeypatch.setattr(loading, "load_policy", None)
    with pytest.raises(PrefpipeError) as error:
        stage.run(config(tiny_model, pairs, **{"grid": ("beta=0.1,0.2",), **changes}), tmp_path / "s", force=False)
    assert said in error.value.message
    assert not (tmp_path / "s").exists()


def test_ranks_are_refused(tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process for each variant"):
        stage.run(config(tiny_model, pairs, "beta=0.1,0.2"), tmp_path / "s", force=False)


def test_a_bad_grid_is_refused_by_the_command_line(call: Callable[..., Any], tmp_path: Path):
    ended = call("sweep", "--pairs", "p", "--grid", "betta=0.1", "--out", tmp_path / "s")
    assert ended.code == 2
    assert "unknown setting 'betta' (did you mean 'beta'?)" in ended.stderr
