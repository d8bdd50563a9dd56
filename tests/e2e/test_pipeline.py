"""The whole path on a tiny model, through the command line."""

import json
from pathlib import Path

from prefpipe.runs import store
from prefpipe.schemas import Pair, RefLogps, from_table
from tests.conftest import Cli

WORDS = ("--rewards", "tests.e2e.letters:most_letters")


def test_generate_pairs_train_evaluate_with_transformers(
    cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    common = ("--model", tiny_model, "--dtype", "float32")
    done = cli(
        "generate", *common, "--prompts", prompts_file, "--engine", "transformers", "--max-tokens", 12,
        "--num-samples", 4, *WORDS, "--check", 0, "--out", tmp_path / "g",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "24 completions of 6 prompts" in done.stdout
    done = cli(
        "build-pairs", "--completions", tmp_path / "g", "--reward", WORDS[1], "--pairs-per-prompt", 2,
        "--truncated-chosen", "keep", "--out", tmp_path / "p",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = cli(
        "train", *common, "--pairs", tmp_path / "p", "--learning-rate", "1e-3", "--train-batch-size", 4,
        "--num-train-epochs", 2, "--out", tmp_path / "t",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert abs(manifest["totals"]["audit"]["loss"] - 0.693147) < 1e-4
    first, *_, last = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    assert abs(first["loss"] - 0.693147) < 1e-4
    assert last["rewards/margins"] > 0
    done = cli(
        "evaluate", *common, "--adapter", tmp_path / "t" / "adapter", "--prompts", prompts_file, "--engine",
        "transformers", "--max-tokens", 12, "--reward", WORDS[1], "--out", tmp_path / "e",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 prompts rated" in done.stdout


def test_pairs_carry_the_log_probs_of_their_completions(
    cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    cli("generate", "--model", tiny_model, "--prompts", prompts_file, "--engine", "fake", "--rewards",
        "short_sentence", "--out", tmp_path / "g")  # fmt: skip
    cli("build-pairs", "--completions", tmp_path / "g", "--reward", "short_sentence", "--out", tmp_path / "p")
    logps = {
        r.completion_id: r for r in from_table(RefLogps, store.read_dataset(tmp_path / "g", "ref_logps", RefLogps))
    }
    pairs = from_table(Pair, store.read_dataset(tmp_path / "p", "pairs", Pair))
    assert pairs
    for pair in pairs:
        assert pair.ref_chosen_token_logps == logps[pair.chosen_completion_id].token_logps
        assert pair.ref_rejected_logps == logps[pair.rejected_completion_id].ref_logps
        assert pair.chosen_reward is not None
        assert pair.rejected_reward is not None
        assert pair.chosen_reward > pair.rejected_reward
