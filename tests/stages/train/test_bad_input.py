"""Bad input through the command line: two lines, the right exit code, and nothing that looks finished."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from prefpipe.ids import ids_digest
from prefpipe.stages.train import stage
from tests.forge import Ended, Forge
from tests.stages.train import data

OTHER = "weights:" + "0" * 32
Train = Callable[..., Ended]


@pytest.fixture
def refused(forged: Forge, tiny_model: Path, tmp_path: Path) -> Callable[..., str]:
    """Run `train` on the tiny model; gives the error line after checking everything that all errors promise."""

    def run(code: int, *arguments: object, model: Path = tiny_model) -> str:
        done = forged.run("train", "--model", model, "--dtype", "float32", *arguments, "--out", tmp_path / "out")
        assert done.code == code, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
        assert [line.split(":")[0] for line in errors] == ["error", "hint"], done.stderr
        assert "Traceback" not in done.stderr
        for name in ("manifest.json", "adapter", "model", "merged", "metrics.jsonl", "checkpoints"):
            assert not (tmp_path / "out" / name).exists(), name
        return errors[0]

    return run


def jsonl(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_missing_reference_that_nobody_here_can_make(refused: Callable[..., str], tmp_path: Path):
    rows = data.bare_pairs(4)
    known = [data.with_values(r, [-1.0] * len(r.chosen_token_ids), [-1.0] * len(r.rejected_token_ids), OTHER, "x")
             for r in rows[:2]]  # fmt: skip
    pairs = data.write_pairs(tmp_path / "p", [*known, *rows[2:]])
    assert "2 of 4 rows have no log-probs of their reference" in refused(65, "--pairs", pairs)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
def test_a_cached_value_that_is_no_number(refused: Callable[..., str], tiny_model: Path, tmp_path: Path, bad: float):
    rows = data.with_reference(data.bare_pairs(4), tiny_model)
    values = [bad, *(rows[1].ref_chosen_token_logps or [])[1:]]
    wrong = data.with_values(rows[1], values, rows[1].ref_rejected_token_logps or [], rows[1].reference, "x/float32")
    pairs = data.write_pairs(tmp_path / "p", [rows[0], wrong, *rows[2:]])
    said = refused(65, "--pairs", pairs)
    assert rows[1].pair_id in said
    assert "not a finite number" in said


def test_a_cached_value_that_is_no_logarithm_of_a_probability(
    refused: Callable[..., str], tiny_model: Path, tmp_path: Path
):
    """The last of many rows, which the audit of one row does not reach; rounding may give a little more than 0."""
    rows = data.with_reference(data.bare_pairs(6), tiny_model)
    values = [0.25, *(rows[5].ref_chosen_token_logps or [])[1:]]
    wrong = data.with_values(rows[5], values, rows[5].ref_rejected_token_logps or [], rows[5].reference, "x/float32")
    said = refused(65, "--pairs", data.write_pairs(tmp_path / "p", [*rows[:5], wrong]), "--audit-rows", 1)
    assert f"row {rows[5].pair_id}: a cached log-prob of completion {rows[5].chosen_completion_id} is 0.25" in said


def test_a_completion_without_tokens(refused: Callable[..., str], tmp_path: Path):
    rows = data.bare_pairs(4)
    digest = ids_digest(rows[3].prompt_token_ids, [])
    rows[3] = replace(rows[3], rejected_token_ids=[], rejected_ids_digest=digest)
    said = refused(65, "--pairs", data.write_pairs(tmp_path / "p", rows))
    assert f"row {rows[3].pair_id}: completion {rows[3].rejected_completion_id} is empty" in said


def test_an_unknown_setting(refused: Callable[..., str], tmp_path: Path):
    (tmp_path / "r.toml").write_text("learning_rat = 1e-4\n")
    assert "did you mean 'learning_rate'" in refused(2, tmp_path / "r.toml")


def test_an_adapter_of_another_base(refused: Callable[..., str], tiny_model: Path, other_model: Path, tmp_path: Path):
    pairs = data.write_pairs(tmp_path / "p", data.bare_pairs(4))
    stage.run(data.config(other_model, pairs), tmp_path / "t", force=False)
    assert "was trained on base" in refused(76, "--pairs", pairs, "--adapter", tmp_path / "t" / "adapter")


def test_pairs_of_another_tokenizer(refused: Callable[..., str], tmp_path: Path):
    row = data.bare_pairs(1)[0]
    ids = [50_000, 2]
    foreign = replace(row, chosen_token_ids=ids, chosen_ids_digest=ids_digest(row.prompt_token_ids, ids))
    said = refused(76, "--pairs", data.write_pairs(tmp_path / "p", [foreign]))
    assert "token id 50000, but the model has 264 tokens" in said
    assert foreign.pair_id in said


def test_empty_data(refused: Callable[..., str], tmp_path: Path):
    assert "empty.jsonl" in refused(65, "--pairs", jsonl(tmp_path / "empty.jsonl"))
    nothing = {"prompt": "a", "chosen": "b", "rejected": "b"}
    assert "same.jsonl" in refused(65, "--pairs", jsonl(tmp_path / "same.jsonl", nothing))


def test_a_split_that_leaves_nothing(refused: Callable[..., str], tmp_path: Path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    said = refused(65, "--pairs", jsonl(tmp_path / "one.jsonl", row), "--eval-split", 0.5)
    assert "eval_split = 0.5 of 1 prompts leaves no prompt" in said


def test_weights_that_are_no_numbers(refused: Callable[..., str], tiny_model: Path, tmp_path: Path):
    """A model with a NaN in it: told by name before anything is computed."""
    shutil.copytree(tiny_model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    pairs = data.write_pairs(tmp_path / "p", data.bare_pairs(4))
    said = refused(65, "--pairs", pairs, model=tmp_path / "m")
    assert "1 weights are not finite numbers in float32 (first model.norm.weight)" in said
