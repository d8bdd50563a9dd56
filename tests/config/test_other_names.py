"""Names of other trainers lead to ours."""

import pytest

from prefpipe.config import base, other_names
from prefpipe.config.commands import SETTINGS

NAMES = {command: [name for name, _ in base.fields(cls)] for command, cls in SETTINGS.items()}
OPERATIONS = {"out", "force"}


def test_every_name_of_ours_in_the_table_is_a_setting() -> None:
    every = {name for names in NAMES.values() for name in names} | OPERATIONS
    assert {name for ours in other_names.OTHER_NAMES.values() for name in ours} <= every
    assert set(other_names._NOTES) <= set(other_names.OTHER_NAMES)


@pytest.mark.parametrize(
    ("command", "word", "found"),
    [
        ("train", "lr", ["learning_rate"]),
        ("train", "learning-rat", ["learning_rate"]),
        ("train", "per-device-train-batch-size", ["train_batch_size"]),
        ("train", "no-gradient-checkpointing", ["gradient_checkpointing"]),
        ("train", "bf16", ["dtype"]),
        ("train", "loss", ["loss_type"]),
        ("train", "rule", []),
        ("generate", "n", ["num_samples"]),
        ("generate", "max_new_tokens", ["max_tokens"]),
        ("generate", "reward_funcs", ["rewards"]),
        ("score", "dataset", ["inputs"]),
        ("evaluate", "data-parallel-size", ["workers"]),
        ("iterate", "lr", ["train.learning_rate"]),
        ("iterate", "train.lr", ["train.learning_rate"]),
        ("iterate", "num-generations", ["generate.num_samples", "evaluate.num_samples"]),
        ("iterate", "lora_r", ["train.lora_r"]),
        ("build-pairs", "min", ["min_gap", "min_gap_sd", "min_chosen_quantile"]),
        ("train", "zzz", []),
        ("train", "", []),
    ],
)
def test_what_is_meant(command: str, word: str, found: list[str]) -> None:
    assert other_names.meant(word, NAMES[command]) == found


def test_a_note_says_where_ours_differs_or_is_needless() -> None:
    assert "whole step" in other_names.note("gradient-accumulation-steps", ["train_batch_size"])
    assert "refused" in other_names.note("trust-remote-code", [])
    assert other_names.said("max-steps", ["num_train_epochs"]) == (
        " (did you mean 'num_train_epochs'? training ends after whole passes over the rows)"
    )
    assert other_names.said("zzz", ["beta"]) == ""
    assert other_names.note("lr", ["learning_rate"]) == other_names.note("zzz", []) == ""
