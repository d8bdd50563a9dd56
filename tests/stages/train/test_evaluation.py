"""Held-out rows: whole prompts, the metrics of a step, the best weights, early stops, and all of it after a resume."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from prefpipe.config.losses import LOSSES
from prefpipe.errors import DataError, StorageError, UsageError
from prefpipe.forward import load
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, score
from prefpipe.inputs.kl_bank import kl_bank
from prefpipe.runs import fsio, store
from prefpipe.schemas import Margin, Pair, from_table
from prefpipe.stages.train import checkpoint, evaluation, loop, stage
from prefpipe.stages.train.evaluation import is_stale, records, split_by_prompt
from prefpipe.stages.train.inputs import prepare
from tests.stages.train import data
from tests.stages.train.runs import metrics

Line = dict[str, float]


@given(st.integers(2, 30), st.integers(1, 4), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_prompt_is_on_one_side_and_no_row_is_lost(num_prompts: int, each: int, share: float, seed: int):
    rows = data.to_train_pairs(data.bare_pairs(num_prompts * each, num_prompts=num_prompts))
    prompts = len({r.prompt_ids for r in rows})
    if not 0 < round(share * prompts) < prompts:
        with pytest.raises(DataError, match="leaves no prompt"):
            split_by_prompt(rows, share, seed)
        return
    training, held_out = split_by_prompt(rows, share, seed)
    assert not {r.prompt_ids for r in training} & {r.prompt_ids for r in held_out}
    assert sorted(r.row_id for r in [*training, *held_out]) == sorted(r.row_id for r in rows)
    assert len({r.prompt_ids for r in held_out}) == round(share * prompts)
    again = split_by_prompt(rows[::-1], share, seed)[1]  # the order of rows does not matter
    assert {r.row_id for r in again} == {r.row_id for r in held_out}


def test_the_prompts_that_are_held_out_are_a_sample_of_all_in_their_order():
    """So that a run of an older version resumes with the same rows."""
    rows = data.to_train_pairs(data.bare_pairs(30, num_prompts=15))
    drawn = random.Random("eval/4").sample(sorted({r.prompt_ids for r in rows}), 4)
    assert [r.row_id for r in split_by_prompt(rows, 0.3, 4)[1]] == [r.row_id for r in rows if r.prompt_ids in drawn]


def test_another_seed_holds_out_other_prompts():
    rows = data.to_train_pairs(data.bare_pairs(40, num_prompts=40))
    found = {tuple(sorted(r.row_id for r in split_by_prompt(rows, 0.2, seed)[1])) for seed in range(5)}
    assert len(found) == 5


def test_an_evaluation_is_the_loss_and_the_metrics_of_a_step_on_the_same_rows(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before anything has moved: one global batch of all rows; and the micro-batches do not matter."""
    rows = data.to_train_pairs(data.with_reference(data.bare_pairs(7), tiny_model))
    for loss in ("sigmoid", "ipo", "simpo"):
        config = data.config(tiny_model, loss_type=(loss,), train_batch_size=7)
        trainer = data.trainer(data.policy(tiny_model), config)
        found = evaluation.evaluate(trainer, rows, []).values
        trainer.budget = 40
        assert evaluation.evaluate(trainer, rows, []).values == pytest.approx(found, rel=1e-5, abs=1e-6)
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "_ROWS", 3)
            some = evaluation.evaluate(trainer, rows, [])
        assert some.values == pytest.approx(found, rel=1e-5, abs=1e-6)
        assert list(some.margins) == list(range(7))
        step = next(loop.steps(trainer, rows, 0)).values
        assert {"eval_loss", "eval_logps/chosen", "eval_rewards/margins"} <= found.keys()
        for name, value in found.items():
            assert step[name.removeprefix("eval_")] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert not any(p.grad is not None and p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("loss", ["kto", "plackett_luce"])
def test_other_kinds_of_rows_are_evaluated_too(tiny_model: Path, tmp_path: Path, loss: str):
    bare = data.bare_pairs(12, num_prompts=6)
    rows = {"labels": data.labels_of(bare)} if loss == "kto" else {"groups": data.groups_of(bare)}
    source = data.write_run(tmp_path / "p", **rows)
    config = data.config(
        tiny_model, loss_type=(loss,), eval_split=0.34, **{name: (str(source),) for name in rows}
    ).model_copy(update={"pairs": ()})
    stage.run(config, tmp_path / "t", force=False)
    last = metrics(tmp_path / "t")[-1]
    assert math.isfinite(last["eval_loss"])
    assert LOSSES[loss].kind in rows


def lines(*values: float) -> list[Line]:
    return [{"step": float(4 * i + 3), "eval_loss": v, "eval_rewards/margins": v} for i, v in enumerate(values)]


def test_records_are_the_new_bests_in_order():
    """Losses 3, 2, 2, nan, 1, 5 after 4, 8, .. steps: new bests at 4, 8, 20; as margins at 4 and 24."""
    history = lines(3, 2, 2, math.nan, 1, 5)
    assert records(history, "eval_loss") == [4, 8, 20]
    assert records(history, "eval_rewards/margins") == [4, 24]
    assert records([], "eval_loss") == []
    assert records(lines(math.nan), "eval_loss") == []
    with pytest.raises(DataError, match="eval_rewards/accuracies is not among"):
        records(history, "eval_rewards/accuracies")


def test_patience_counts_evaluations_since_the_best():
    assert not is_stale(lines(3, 2, 2, 2), "eval_loss", 3)
    assert is_stale(lines(3, 2, 2, 2), "eval_loss", 2)
    assert not is_stale(lines(3, 2, 2, 1), "eval_loss", 2)
    assert is_stale(lines(math.nan, math.nan), "eval_loss", 2)
    assert not is_stale(lines(3, 4, 5, 6), "eval_loss", 0)
    assert not is_stale([], "eval_loss", 1)


@pytest.fixture(scope="module")
def rows(tiny_model: Path) -> list[Pair]:
    return data.with_reference(data.bare_pairs(12, num_prompts=6), tiny_model)


@pytest.fixture(scope="module")
def pairs(rows: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.write_pairs(tmp_path_factory.mktemp("pairs") / "p", rows)


def test_a_run_evaluates_on_time_and_after_the_last_step(tiny_model: Path, pairs: Path, tmp_path: Path):
    """12 pairs of 6 prompts, a third held out: 8 pairs in steps of 2, twice, evaluated after 3, 6 and 8 steps."""
    config = data.config(tiny_model, pairs, train_batch_size=2, eval_split=0.34, eval_steps=3)
    manifest = stage.run(config, tmp_path / "t", force=False)
    assert (manifest["totals"]["pairs"], manifest["totals"]["eval_pairs"]) == (8, 4)
    assert [line["step"] + 1 for line in metrics(tmp_path / "t") if "eval_loss" in line] == [3, 6, 8]
    assert "eval_loss" in (tmp_path / "t" / "adapter" / "README.md").read_text()


def test_training_is_the_same_with_and_without_evaluations(tiny_model: Path, rows: list[Pair], tmp_path: Path):
    """Rows of --eval-pairs change nothing in the weights, with dropout too."""
    first, second = data.write_pairs(tmp_path / "a", rows[:8]), data.write_pairs(tmp_path / "b", rows[8:])
    for name, given_ in (("with", {"eval_pairs": (str(second),), "eval_steps": 1}), ("without", {})):
        stage.run(data.config(tiny_model, first, lora_dropout=0.2, **given_), tmp_path / name, force=False)
    both = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("with", "without")]
    assert all((both[0][k] == both[1][k]).all() for k in both[0])


def best_config(tiny_model: Path, pairs: Path, **changes: Any) -> Any:
    """A learning rate that overshoots: the evaluation loss falls and rises again."""
    return data.config(
        tiny_model, pairs, train_batch_size=2, eval_split=0.34, eval_steps=1, learning_rate=0.3, num_train_epochs=3,
        lr_scheduler_type="constant", load_best_model_at_end=True, **{"save_steps": 4, **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def best(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("best") / "t"
    stage.run(best_config(tiny_model, pairs), out, force=False)
    return out


def test_the_best_weights_are_kept(best: Path):
    """The saved adapter holds the masters of the step with the lowest evaluation loss, which is not the last one."""
    history = [(line["eval_loss"], line["step"] + 1) for line in metrics(best)]
    lowest = min(history)
    assert lowest[1] < history[-1][1], "the case is not one"
    told = store.read_manifest(best)["totals"]["best"]
    assert (told["value"], told["step"], told["metric"]) == (*lowest, "eval_loss")
    state = load_file(best / "checkpoints" / f"step-{lowest[1]:08d}" / "state.safetensors")
    adapter = load_file(best / "adapter" / "adapter_model.safetensors")
    for name, tensor in adapter.items():
        assert (state["master/policy." + name.replace(".weight", ".default.weight")] == tensor).all(), name
    assert len(list((best / "checkpoints").iterdir())) <= 3
    held_out = [row for row in from_table(Margin, store.read_dataset(best, "margins", Margin)) if row.held_out]
    assert {row.step for row in held_out} == {lowest[1]}
    of_best = metrics(best)[lowest[1] - 1]["eval_rewards/margins"]
    assert sum(row.margin for row in held_out) / len(held_out) == pytest.approx(of_best, rel=1e-6)
    assert "the best by eval_loss" in (best / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("fault", ["append:2", "append:5", "append:11", "rename:6", "rename:9"])
def test_a_resumed_run_finds_the_same_best(
    tiny_model: Path, pairs: Path, best: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
):
    point, number = fault.split(":")
    monkeypatch.setenv("PREFPIPE_FAULT", f"{point}:{fsio._passes[point] + int(number)}:eio")
    with pytest.raises(StorageError):
        stage.run(best_config(tiny_model, pairs), tmp_path / "t", force=False)
    monkeypatch.delenv("PREFPIPE_FAULT")
    manifest = stage.run(best_config(tiny_model, pairs), tmp_path / "t", force=False)
    assert manifest["digest"] == store.read_manifest(best)["digest"]
    assert (tmp_path / "t" / "metrics.jsonl").read_bytes() == (best / "metrics.jsonl").read_bytes()


def test_patience_stops_early_and_a_finished_run_stays_stopped(
    tiny_model: Path, pairs: Path, best: Path, tmp_path: Path
):
    """The same run with patience 2 ends two evaluations after the best so far, with the same lines up to there; when
    its adapter is lost it is saved again without another step."""
    config = best_config(tiny_model, pairs, early_stopping_patience=2)
    manifest = stage.run(config, tmp_path / "t", force=False)
    whole, ours = metrics(best), metrics(tmp_path / "t")
    assert ours == whole[: len(ours)]
    assert len(ours) < len(whole)
    assert manifest["totals"]["steps"] == len(ours) == manifest["totals"]["best"]["step"] + 2
    for path in ((tmp_path / "t" / "manifest.json"), *(tmp_path / "t" / "adapter").iterdir()):
        path.unlink()
    (tmp_path / "t" / "adapter").rmdir()
    assert stage.run(config, tmp_path / "t", force=False)["digest"] == manifest["digest"]


def test_a_lost_best_checkpoint_is_an_error_not_another_model(tiny_model: Path, pairs: Path, best: Path):
    step = store.read_manifest(best)["totals"]["best"]["step"]
    with pytest.raises(DataError, match="the best one, is damaged or missing"):
        checkpoint.at_step(best / "nowhere", step)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_split_that_leaves_no_prompt_is_refused(tiny_model: Path, pairs: Path, tmp_path: Path, share: float):
    with pytest.raises(DataError, match="6 prompts leaves no prompt") as caught:
        stage.run(data.config(tiny_model, pairs, eval_split=share), tmp_path / "t", force=False)
    assert caught.value.exit_code == 65
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("loss", "kind", "wrong"),
    [("kto", "labels", "pairs"), ("plackett_luce", "groups", "labels"), ("ipo", "pairs", "groups")],
)
def test_held_out_rows_of_another_kind_are_refused(tiny_model: Path, loss: str, kind: str, wrong: str):
    given_ = {"pairs": (), kind: ("a",), f"eval_{wrong}": ("b",), "loss_type": (loss,)}
    with pytest.raises(UsageError, match=f"loss {loss} is evaluated on {kind}, but --eval-{wrong} is given") as caught:
        prepare(data.config(tiny_model, **given_))
    assert caught.value.hint == f"give them as --eval-{kind}, or use --eval-split"


@pytest.mark.parametrize(("loss", "kind"), [("kto", "labels"), ("plackett_luce", "groups")])
def test_held_out_rows_of_every_kind_are_scored_evaluated_and_counted(
    tiny_model: Path, tmp_path: Path, loss: str, kind: str, capsys: pytest.CaptureFixture[str]
):
    """The history of `eval_` metrics is that of the same rows held out by hand; the weights are those without them."""
    bare = data.bare_pairs(12, num_prompts=6)
    every = {"labels": data.labels_of, "groups": data.groups_of}[kind](bare)
    ids = {row.prompt_id for row in bare[:4]}
    parts = {"a": [r for r in every if r.prompt_id in ids], "b": [r for r in every if r.prompt_id not in ids]}
    runs = {name: str(data.write_run(tmp_path / name, **{kind: rows})) for name, rows in parts.items()}
    for name, held_out in (("with", {f"eval_{kind}": (runs["b"],), "eval_steps": 1}), ("without", {})):
        config = data.config(tiny_model, loss_type=(loss,), **{kind: (runs["a"],)}, **held_out)
        manifest = stage.run(config, tmp_path / name, force=False)
        assert (f"eval_{kind}" in manifest["totals"]) == (name == "with")
    assert "are trained on too" not in capsys.readouterr().err
    found = metrics(tmp_path / "with")
    assert all(math.isfinite(line["eval_loss"]) for line in found)
    assert store.read_manifest(tmp_path / "with")["totals"][f"eval_{kind}"] == len(parts["b"])
    both = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("with", "without")]
    assert all((both[0][k] == both[1][k]).all() for k in both[0])


def test_held_out_labels_bring_a_bank_or_get_one_of_their_own(tiny_model: Path, tmp_path: Path):
    labels = data.labels_of(data.bare_pairs(12, num_prompts=6))
    ids = {row.prompt_id for row in labels[:6]}
    ours, theirs = ([r for r in labels if (r.prompt_id in ids) == side] for side in (True, False))
    stored = kl_bank(theirs, 5, seed=3)
    a, made = (data.write_run(tmp_path / name, labels=rows) for name, rows in (("a", ours), ("made", theirs)))
    brought = data.write_run(tmp_path / "brought", labels=theirs, kl_bank=stored)
    settings = {"loss_type": ("kto",), "labels": (str(a),), "kl_bank_size": 7}
    for run, expected in ((made, kl_bank(theirs, 7, 0)), (brought, stored)):
        job = prepare(data.config(tiny_model, **settings, eval_labels=(str(run),)))
        assert [row.row_id for row in job.eval_bank] == [row.bank_id for row in expected]
        assert [row.row_id for row in job.training_bank] == [row.bank_id for row in kl_bank(ours, 7, 0)]
        assert job.bank == [*job.training_bank, *job.eval_bank]
    split = prepare(data.config(tiny_model, **settings, eval_split=0.34))
    assert split.eval_bank == split.training_bank == split.bank


def test_z0_of_an_evaluation_is_that_of_the_held_out_bank(tiny_model: Path, tmp_path: Path):
    """One step, then: max(0, mean log-ratio of the bank of --eval-labels) with the saved adapter on and off. Its
    completions are all desirable, so that they gain; the bank of the training rows is another one."""
    labels = data.labels_of(data.bare_pairs(12, num_prompts=6))
    bank = kl_bank([row for row in labels if row.label], 6, seed=3)
    a, b = (
        data.write_run(tmp_path / name, labels=labels, **own) for name, own in (("a", {}), ("b", {"kl_bank": bank}))
    )
    config = data.config(tiny_model, loss_type=("kto",), labels=(str(a),), eval_labels=(str(b),), train_batch_size=24,
                         num_train_epochs=1, warmup_ratio=0.0, learning_rate=3e-2)  # fmt: skip
    stage.run(config, tmp_path / "t", force=False)
    adapter = tmp_path / "t" / "adapter"
    model = TreeModel(load.load_adapter(load.load_model(tiny_model, "float32"), adapter, trainable=False))
    trees = [Tree(row.prompt_token_ids, (row.token_ids,)) for row in bank]
    with_it = [sum(own) for (own,) in score(model, trees)]
    with load.adapter_off(model.policy, off=True):
        without = [sum(own) for (own,) in score(model, trees)]
    gained = (sum(with_it) - sum(without)) / len(bank)
    assert gained > 0.1, "the case is not one"
    assert metrics(tmp_path / "t")[-1]["eval_kto/z0"] == pytest.approx(gained, rel=1e-4)


def test_eval_prompts_that_are_trained_on_are_told(
    tiny_model: Path, rows: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    a, b = data.write_pairs(tmp_path / "a", rows[:8]), data.write_pairs(tmp_path / "b", rows[6:])
    stage.run(data.config(tiny_model, a, eval_pairs=(str(b),)), tmp_path / "t", force=False)
    assert "prompts of --eval-pairs are trained on too" in capsys.readouterr().err
