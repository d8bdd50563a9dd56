"""The train stage: identity and audit of the cache, live references, rounds, resume to the bit, one model in memory."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, GraniteConfig, LlamaForCausalLM, PretrainedConfig

from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError, PrefpipeError, StorageError, UsageError
from prefpipe.forward import load
from prefpipe.forward.head import LogitRule
from prefpipe.models import policy
from prefpipe.runs import fsio, store, tables
from prefpipe.schemas import Dropped, Margin, Pair, RefLogps, from_table
from prefpipe.stages.train import stage
from tests.conftest import Cli
from tests.stages.train import data
from tests.stages.train.runs import adapter, metrics

LN2 = math.log(2)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("trained") / "t"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stage.run(data.config(tiny_model, pairs), out, force=False)
    torch.set_num_threads(threads)
    return out


def run(config: TrainConfig, out: Path) -> dict[str, Any]:
    return stage.run(config, out, force=False)


def same_result(out: Path, other: Path) -> None:
    assert (out / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert adapter(out) == adapter(other)
    ours, theirs = (store.read_manifest(o) for o in (out, other))
    assert ours["digest"] == theirs["digest"]
    assert ours["identity"] == theirs["identity"]


def test_a_run_holds_what_it_promises(tiny_model: Path, trained: Path):
    """10 pairs in steps of 4, twice: 6 steps. Step 0 is ln 2; the margin is above 0 at the end."""
    manifest = store.read_manifest(trained)
    assert manifest["totals"]["steps"] == 6
    assert manifest["totals"]["pairs"] == 10
    assert manifest["totals"]["audit"]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert manifest["totals"]["audit"]["largest_h"] < 1e-3
    lines = metrics(trained)
    assert [line["step"] for line in lines] == list(range(6))
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-4)
    assert lines[-1]["rewards/margins"] > 0.1
    assert lines[-1]["loss"] < lines[0]["loss"]
    rows = from_table(Margin, store.read_dataset(trained, "margins", Margin))
    assert len({row.row_id for row in rows}) == len(rows) == 10
    assert {row.step for row in rows} == {4, 5, 6}  # of the second epoch
    newest = [row.margin for row in rows if row.step == 6]
    assert sum(newest) / len(newest) == pytest.approx(lines[-1]["rewards/margins"], rel=1e-6)
    base = policy.resolve(str(tiny_model)).id
    assert manifest["identity"]["reference"] == manifest["identity"]["initial"] == base
    assert manifest["identity"]["policy"] == policy.resolve(str(tiny_model), str(trained / "adapter")).id
    assert "trained on 10 pairs in 6 steps" in stage.summary(manifest, trained)[0]


def test_doing_it_again_does_nothing(
    tiny_model: Path, pairs: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file() and p.name not in (".owner", ".lock")}
    counted = count_models(monkeypatch)
    assert run(data.config(tiny_model, pairs), trained) == store.read_manifest(trained)
    assert counted == []
    assert "complete already" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in before}


def count_models(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the causal language models that transformers constructs from now on."""
    constructed: list[str] = []
    original = LlamaForCausalLM.__init__

    def counting(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> None:
        constructed.append(type(self).__name__)
        original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", counting)
    return constructed


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_only_one_model_is_ever_constructed(
    tiny_model: Path, pairs: Path, tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch
):
    source = pairs if reference == "cached" else data.write_pairs(tmp_path / "p", data.bare_pairs(10))
    counted = count_models(monkeypatch)
    run(data.config(tiny_model, source), tmp_path / "t")
    assert counted == ["LlamaForCausalLM"]


def test_a_live_reference_gives_the_same_run_as_a_cached_one(tiny_model: Path, trained: Path, tmp_path: Path):
    """The same pairs with null reference columns: the stage makes the values itself, and the weights are the same."""
    bare = data.write_pairs(tmp_path / "p", data.bare_pairs(10))
    run(data.config(tiny_model, bare), tmp_path / "t")
    assert adapter(tmp_path / "t") == adapter(trained)
    assert metrics(tmp_path / "t") == metrics(trained)
    made = from_table(RefLogps, store.read_dataset(tmp_path / "t", "ref_logps", RefLogps))
    assert len(made) == 20
    assert {m.reference for m in made} == {policy.resolve(str(tiny_model)).id}
    assert {m.scorer for m in made} == {load.scorer_name("float32")}


def test_missing_values_of_some_rows_are_filled(tiny_model: Path, rows: list[Pair], trained: Path, tmp_path: Path):
    bare = data.bare_pairs(10)
    mixed = data.write_pairs(tmp_path / "p", [bare[i] if i % 3 == 0 else rows[i] for i in range(10)])
    run(data.config(tiny_model, mixed), tmp_path / "t")
    assert adapter(tmp_path / "t") == adapter(trained)
    made = store.read_dataset(tmp_path / "t", "ref_logps", RefLogps)
    assert made.num_rows == 2 * 4


@pytest.mark.parametrize("fault", ["append:1", "append:3", "append:6", "rename:5", "write:6"])
@pytest.mark.parametrize("save_steps", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted(
    tiny_model: Path, pairs: Path, trained: Path, tmp_path: Path, fault: str, save_steps: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """An I/O error at the n-th pass of a point; then the same command again, without the fault."""
    config = data.config(tiny_model, pairs, save_steps=save_steps)
    point, number = fault.split(":")
    monkeypatch.setenv("PREFPIPE_FAULT", f"{point}:{fsio._passes[point] + int(number)}:eio")
    with pytest.raises(StorageError):
        run(config, tmp_path / "t")
    monkeypatch.delenv("PREFPIPE_FAULT")
    assert not (tmp_path / "t" / "manifest.json").exists()
    run(config, tmp_path / "t")
    same_result(tmp_path / "t", trained)
    assert not list((tmp_path / "t").rglob("*.tmp"))


def test_killed_in_the_middle_of_training_and_resumed(
    cli: Cli, tiny_model: Path, pairs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """SIGKILL to a real process before the fourth metrics line; the checkpoint after step 3 is where it goes on."""
    config = data.config(tiny_model, pairs)
    killed = cli(
        "train", "--model", tiny_model, "--pairs", pairs, "--dtype", "float32", "--learning-rate", config.learning_rate,
        "--train-batch-size", 4, "--num-train-epochs", 2, "--lora-r", 4, "--lora-alpha", 8, "--save-steps", 1,
        "--out", tmp_path / "t", env={"PREFPIPE_FAULT": "append:4:kill"},
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    assert len(metrics(tmp_path / "t")) == 3
    run(config, tmp_path / "t")
    assert "resuming after step 3" in capsys.readouterr().err
    same_result(tmp_path / "t", trained)


def test_a_torn_metrics_line_and_a_damaged_checkpoint_are_overcome(
    tiny_model: Path, pairs: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The newest checkpoint is damaged and half a line hangs at the end of metrics.jsonl: step 4 is done again."""
    config = data.config(tiny_model, pairs)
    monkeypatch.setenv("PREFPIPE_FAULT", f"append:{fsio._passes['append'] + 5}:eio")
    with pytest.raises(StorageError):
        run(config, tmp_path / "t")
    monkeypatch.delenv("PREFPIPE_FAULT")
    newest = tmp_path / "t" / "checkpoints" / "step-00000004" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    with (tmp_path / "t" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run(config, tmp_path / "t")
    same_result(tmp_path / "t", trained)
    assert (tmp_path / "t" / "quarantine" / "step-00000004").is_dir()


def test_other_settings_do_not_resume_here(tiny_model: Path, pairs: Path, trained: Path):
    with pytest.raises(UsageError, match=r"beta: 0\.1 there, 0\.2 now"):
        run(data.config(tiny_model, pairs, beta=0.2), trained)


def test_a_token_budget_and_cadence_are_no_other_settings(tiny_model: Path, pairs: Path, trained: Path):
    config = data.config(tiny_model, pairs, max_tokens_per_micro_batch=64, save_steps=3)
    assert run(config, trained)["digest"] == store.read_manifest(trained)["digest"]


def refused(config: TrainConfig, out: Path) -> IdentityError:
    with pytest.raises(IdentityError) as caught:
        run(config, out)
    assert caught.value.exit_code == 76
    assert not (out / "manifest.json").exists()
    assert not (out / "adapter").exists()
    return caught.value


def test_the_reference_of_another_model_is_refused_by_name(pairs: Path, other_model: Path, tmp_path: Path):
    error = refused(data.config(other_model, pairs), tmp_path / "t")
    assert "(different: weights)" in error.message


def test_the_reference_of_another_adapter_is_refused_by_name(tiny_model: Path, trained: Path, tmp_path: Path):
    """Made by base + adapter, trained from the base: neither the initial policy nor its base."""
    own = data.with_reference(data.bare_pairs(4), tiny_model, adapter=trained / "adapter")
    error = refused(data.config(tiny_model, data.write_pairs(tmp_path / "p", own)), tmp_path / "t")
    assert "(different: adapter)" in error.message


def test_an_adapter_of_another_base_is_refused(pairs: Path, trained: Path, other_model: Path, tmp_path: Path):
    error = refused(data.config(other_model, pairs, adapter=str(trained / "adapter")), tmp_path / "t")
    assert "was trained on base" in error.message


@pytest.mark.parametrize("side", ["prompt_token_ids", "chosen_token_ids", "rejected_token_ids"])
def test_edited_token_ids_are_refused(tiny_model: Path, rows: list[Pair], tmp_path: Path, side: str):
    ids = list(getattr(rows[3], side))
    ids[0] = ids[0] + 1 if ids[0] < 250 else 100
    edited = [*rows[:3], replace(rows[3], **{side: ids}), *rows[4:]]
    error = refused(data.config(tiny_model, data.write_pairs(tmp_path / "p", edited)), tmp_path / "t")
    assert rows[3].pair_id in error.message


@pytest.mark.parametrize(("shift", "exact"), [(-0.05, True), (0.02, True), (-0.05, False), (0.02, False)])
def test_a_consistent_corruption_of_the_cache_is_caught_by_the_audit(
    tiny_model: Path, rows: list[Pair], tmp_path: Path, shift: float, exact: bool
):
    """Every token value shifted and its sum with it, digests right: only re-scoring can tell."""
    scorer = load.scorer_name("float32") if exact else "other/float32"

    def moved(values: list[float] | None) -> list[float]:
        return [v + shift for v in values or ()]

    shifted = [
        data.with_values(r, moved(r.ref_chosen_token_logps), moved(r.ref_rejected_token_logps), r.reference, scorer)
        for r in rows
    ]
    error = refused(data.config(tiny_model, data.write_pairs(tmp_path / "p", shifted)), tmp_path / "t")
    assert "do not belong to this model" in error.message


def test_swapped_values_of_two_rows_are_caught(tiny_model: Path, rows: list[Pair], tmp_path: Path):
    """chosen and rejected of one pair with equal length, exchanged: digests and lengths are right, h is not 0."""
    row = next(r for r in data.with_reference(data.bare_pairs(60), tiny_model)
               if len(r.chosen_token_ids) == len(r.rejected_token_ids))  # fmt: skip
    wrong = data.with_values(
        row, row.ref_rejected_token_logps or [], row.ref_chosen_token_logps or [], row.reference, row.scorer or ""
    )
    kept = [r for r in rows if r.pair_id != row.pair_id]
    refused(data.config(tiny_model, data.write_pairs(tmp_path / "p", [*kept, wrong])), tmp_path / "t")


@pytest.mark.parametrize("missing", [1, -1])
def test_values_of_another_number_of_tokens_are_refused_wherever_they_are(
    tiny_model: Path, rows: list[Pair], tmp_path: Path, missing: int
):
    """A row whose cache has one value too few or too many, outside the single row that the audit looks at.

    Its sum is wrong by a whole token: an identity or data error that names the pair, before any step.
    """
    longest = max(rows, key=lambda r: len(r.chosen_token_ids) + len(r.rejected_token_ids))
    values = list(longest.ref_chosen_token_logps or ())
    values = values[:-1] if missing == 1 else [*values, -1.0]
    wrong = data.with_values(
        longest, values, longest.ref_rejected_token_logps or [], longest.reference, longest.scorer or ""
    )
    edited = data.write_pairs(tmp_path / "p", [wrong if r is longest else r for r in rows])
    with pytest.raises((IdentityError, DataError)) as caught:
        run(data.config(tiny_model, edited, audit_rows=1), tmp_path / "t")
    assert longest.pair_id in caught.value.message


def test_two_references_in_one_run_are_refused(tiny_model: Path, rows: list[Pair], tmp_path: Path):
    mixed = [replace(rows[0], reference="weights:" + "0" * 32), *rows[1:]]
    with pytest.raises(DataError, match="2 references"):
        run(data.config(tiny_model, data.write_pairs(tmp_path / "p", mixed)), tmp_path / "t")


def test_nll_alone_needs_no_reference_and_never_audits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = data.write_pairs(tmp_path / "p", data.bare_pairs(10))
    manifest = run(data.config(tiny_model, source, loss_type=("nll",)), tmp_path / "t")
    assert manifest["totals"]["audit"] is None
    assert manifest["identity"]["reference"] is None
    assert not (tmp_path / "t" / "ref_logps").exists()
    lines = metrics(tmp_path / "t")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "rewards/margins" not in lines[0]


@pytest.mark.parametrize("reference", ["base", "previous"])
def test_the_second_round_continues_an_adapter(tiny_model: Path, trained: Path, tmp_path: Path, reference: str):
    """Reference = base: audited with the adapter off, and step 0 is not ln 2, for the policy has moved already.

    Reference = the previous policy: audited with the adapter on, and step 0 is ln 2 again.
    """
    previous = trained / "adapter"
    own = data.with_reference(data.bare_pairs(10), tiny_model, adapter=None if reference == "base" else previous)
    config = data.config(tiny_model, data.write_pairs(tmp_path / "p", own), adapter=str(previous))
    manifest = run(config, tmp_path / "t")
    assert manifest["totals"]["audit"]["loss"] == pytest.approx(LN2, abs=1e-5)
    before, after = (policy.resolve(str(tiny_model), str(o / "adapter")).id for o in (trained, tmp_path / "t"))
    assert manifest["identity"]["initial"] == before
    assert manifest["identity"]["policy"] == after != before
    lines = metrics(tmp_path / "t")
    if reference == "base":
        assert lines[0]["rewards/margins"] > 0.05  # what the first round gained
        assert manifest["identity"]["reference"] == policy.resolve(str(tiny_model)).id
    else:
        assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-4)
        assert manifest["identity"]["reference"] == before
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]


def test_missing_values_in_a_second_round_are_never_of_another_reference(
    tiny_model: Path, trained: Path, tmp_path: Path
):
    """Cached rows are of the base, the policy starts from an adapter, some rows have no values.

    Filling them from the initial policy would mix two references in one run. Right is to refuse, or to fill them from
    the base; the audit looks at one row here, and cannot be what notices.
    """
    bare = data.bare_pairs(10, seed=1)
    cached = data.with_reference(bare, tiny_model)
    shortest = min(bare, key=lambda r: (len(r.chosen_token_ids) + len(r.rejected_token_ids), r.pair_id))
    mixed = [b if i % 2 and b is not shortest else c for i, (b, c) in enumerate(zip(bare, cached, strict=True))]
    config = data.config(
        tiny_model, data.write_pairs(tmp_path / "p", mixed), adapter=str(trained / "adapter"), audit_rows=1
    )
    try:
        run(config, tmp_path / "t")
    except PrefpipeError:
        return
    made = from_table(RefLogps, store.read_dataset(tmp_path / "t", "ref_logps", RefLogps))
    assert {m.reference for m in made} == {policy.resolve(str(tiny_model)).id}


def foreign_file(path: Path) -> Path:
    """TRL-style preferences: messages and plain text, one row with nothing to prefer."""
    lines = [
        {"prompt": f"What is {n} and {n}?", "chosen": f"It is {2 * n}.", "rejected": "I would rather not say."}
        for n in range(6)
    ]
    lines += [
        {
            "prompt": [{"role": "user", "content": "Name a colour."}],
            "chosen": [{"role": "assistant", "content": "Blue."}],
            "rejected": [{"role": "assistant", "content": "Bread."}],
        },
        {"prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_foreign_file_alone_is_enough(tiny_model: Path, tmp_path: Path):
    """No run of ours, no reference: values are made, kept in OUT, and step 0 is ln 2 to 1e-6."""
    source = foreign_file(tmp_path / "pairs.jsonl")
    manifest = run(data.config(tiny_model, source), tmp_path / "t")
    assert metrics(tmp_path / "t")[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert manifest["totals"]["pairs"] == 7
    assert manifest["totals"]["dropped"] == 1
    made = from_table(RefLogps, store.read_dataset(tmp_path / "t", "ref_logps", RefLogps))
    assert len(made) == 14
    assert all(len(m.token_logps) == m.num_tokens for m in made)
    assert all(m.ref_logps == pytest.approx(sum(m.token_logps), rel=1e-6) for m in made)
    (dropped,) = from_table(Dropped, tables.read_parquet(tmp_path / "t" / "dropped.parquet"))
    assert (dropped.reason, dropped.id) == ("identical", f"{source}, line 8")


def test_a_foreign_run_resumes_with_the_values_it_made(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = data.config(tiny_model, foreign_file(tmp_path / "pairs.jsonl"))
    run(config, tmp_path / "whole")
    monkeypatch.setenv("PREFPIPE_FAULT", f"append:{fsio._passes['append'] + 2}:eio")
    with pytest.raises(StorageError):
        run(config, tmp_path / "t")
    monkeypatch.delenv("PREFPIPE_FAULT")
    part = tmp_path / "t" / "ref_logps" / "part-00000.parquet"
    written = part.stat().st_mtime_ns
    capsys.readouterr()
    run(config, tmp_path / "t")
    assert "they are scored once, now" not in capsys.readouterr().err
    assert part.stat().st_mtime_ns == written
    same_result(tmp_path / "t", tmp_path / "whole")


def test_a_foreign_file_and_a_run_together(tiny_model: Path, pairs: Path, tmp_path: Path):
    source = foreign_file(tmp_path / "pairs.jsonl")
    manifest = run(data.config(tiny_model, pairs, source), tmp_path / "t")
    assert manifest["totals"]["pairs"] == 17


def test_no_pairs_is_a_usage_error(tiny_model: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="no pairs given"):
        run(data.config(tiny_model), tmp_path / "t")


def save_model(config: PretrainedConfig, into: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(into)
    return into


def test_scaled_logits_train_in_shared_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Granite divides its logits by 8: the head does so too, and step 0 is ln 2 exactly."""
    config = GraniteConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, logits_scaling=8.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    source = data.write_pairs(tmp_path / "p", data.bare_pairs(4))
    run(data.config(save_model(config, tmp_path / "m"), source), tmp_path / "t")
    assert metrics(tmp_path / "t")[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert "a row of its own" not in capsys.readouterr().err


def test_an_architecture_that_cannot_share_rows_trains_in_separate_ones_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Bloom's positions are biases of the row: a notice, then the same training; the loss falls from ln 2."""
    config = BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3)
    source = data.write_pairs(tmp_path / "p", data.bare_pairs(4))
    run(data.config(save_model(config, tmp_path / "m"), source), tmp_path / "t")
    assert "a pair costs up to twice its shared row: its attention bias (ALiBi)" in capsys.readouterr().err
    lines = metrics(tmp_path / "t")
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["tokens/unique"] == lines[0]["tokens/logical"]


def test_an_architecture_that_is_computed_wrongly_is_refused(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
):
    """A logit rule that the model does not have: the self-test says so before anything is trained."""
    monkeypatch.setattr("prefpipe.forward.logps.logit_rule", lambda _text: LogitRule(cap=1.0))
    with pytest.raises(UsageError, match=r"not supported yet: .* differ .* by \d"):
        run(data.config(tiny_model, pairs), tmp_path / "t")
    assert not (tmp_path / "t" / "adapter").exists()


def test_bfloat16_trains_on_a_cache_of_its_own_dtype(tiny_model: Path, tmp_path: Path):
    own = data.with_reference(data.bare_pairs(10), tiny_model, dtype="bfloat16")
    source = data.write_pairs(tmp_path / "p", own)
    run(data.config(tiny_model, source, dtype="bfloat16"), tmp_path / "t")
    assert metrics(tmp_path / "t")[0]["loss"] == pytest.approx(LN2, abs=0.05)
    tensors = load_file(tmp_path / "t" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_the_adapter_moves_with_its_directory(tiny_model: Path, pairs: Path, trained: Path, tmp_path: Path):
    """Identity is content: a copied adapter on a copied model is the same policy."""
    shutil.copytree(tiny_model, tmp_path / "m")
    shutil.copytree(trained / "adapter", tmp_path / "a")
    copied = policy.resolve(str(tmp_path / "m"), str(tmp_path / "a"))
    assert copied.id == store.read_manifest(trained)["identity"]["policy"]


def test_a_damaged_adapter_is_made_again(tiny_model: Path, pairs: Path, trained: Path, tmp_path: Path):
    """One bit of a finished adapter flips: the same command puts the damaged file aside and gives the same bytes."""
    shutil.copytree(trained, tmp_path / "t")
    file = tmp_path / "t" / "adapter" / "adapter_model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(bytes(damaged))
    run(data.config(tiny_model, pairs), tmp_path / "t")
    assert file.is_file()
    same_result(tmp_path / "t", trained)
