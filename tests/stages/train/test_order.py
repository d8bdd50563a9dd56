"""The order of rows: by hand, the same in every epoch, through the command line, and over a resumed run to the bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config import base
from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError
from prefpipe.stages.train.examples import TrainCompletion, TrainLabel, TrainPair
from prefpipe.stages.train.mixing import epoch_batches
from tests.conftest import Call
from tests.stages.train import data

GAPS = (0.5, 2.0, 0.5, 1.0, 3.0, -1.0, 0.5)
PROMPTS = ((1,), (2,), (1,), (3,), (1,), (2,), (4,))


def rows() -> list[TrainPair]:
    return [
        TrainPair(f"p{n}", "c", "r", prompt, (1,), (2,), None, None, 1.0, None, gap)
        for n, (prompt, gap) in enumerate(zip(PROMPTS, GAPS, strict=True))
    ]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"train_order": "given"}, [[0, 1, 2], [3, 4, 5], [6]]),
        ({"train_order": "hardness"}, [[4, 1, 3], [0, 2, 6], [5]]),  # equal gaps in the order of the rows
        ({"train_order": "given", "group_by_prompt": True}, [[0, 2, 4], [1, 5, 3], [6]]),
        ({"train_order": "hardness", "group_by_prompt": True}, [[4, 0, 2], [1, 5, 3], [6]]),
    ],
    ids=str,
)
def test_a_fixed_order_is_that_of_every_epoch_and_seed(changes: dict[str, Any], steps: list[list[int]]) -> None:
    for seed in (0, 7):
        config = TrainConfig(train_batch_size=3, seed=seed, **changes)
        assert [epoch_batches(rows(), config, epoch) for epoch in (0, 1)] == [steps, steps]


def test_rows_are_shuffled_unless_asked_otherwise() -> None:
    config = TrainConfig(train_batch_size=3)
    first, second = (epoch_batches(rows(), config, epoch) for epoch in (0, 1))
    assert first != second
    assert sorted(row for step in first for row in step) == list(range(7))


def test_labels_as_given_are_not_mixed_by_class() -> None:
    labels = [TrainLabel(f"l{n}", (1,), TrainCompletion("c", (1,), None), n < 3, 1.0) for n in range(6)]
    config = TrainConfig(loss_type=("kto",), train_batch_size=3, train_order="given")
    assert epoch_batches(labels, config, 0) == [[0, 1, 2], [3, 4, 5]]
    for loss in ("kto", "plackett_luce"):
        with pytest.raises(UsageError, match=f"hardness orders pairs by reward_gap: loss {loss}"):
            base.load(TrainConfig, None, {"loss_type": [loss], "train_order": "hardness"})


def test_pairs_without_rewards_have_no_hardness(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "p", "chosen": "good", "rejected": "bad"}, {"prompt": "q", "chosen": "yes", "rejected": "no"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("train", "--model", tiny_model, "--pairs", tmp_path / "p.jsonl", "--dtype", "float32", "--lora-r", 2)
    done = call(*command, "--train-order", "hardness", "--out", tmp_path / "t")
    assert (done.code, "2 of 2 pairs have no reward_gap" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "t").exists()
    done = call(*command, "--train-order", "given", "--train-batch-size", 1, "--out", tmp_path / "t")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize(("order", "first"), [("given", (0, 1)), ("hardness", (4, 1))])
def test_a_resumed_run_goes_on_in_the_order_to_the_bit(
    call: Call, tiny_model: Path, tmp_path: Path, order: str, first: tuple[int, int]
) -> None:
    """The second run goes on after step 1 of 6, in the middle of the first of two epochs."""
    bare = zip(data.bare_pairs(6), GAPS, strict=False)
    stored = data.with_reference([replace(pair, reward_gap=gap) for pair, gap in bare], tiny_model)
    command = (
        "train", "--model", tiny_model, "--pairs", data.write_pairs(tmp_path / "p", stored), "--dtype", "float32",
        "--lora-r", 2, "--train-batch-size", 2, "--num-train-epochs", 2, "--save-steps", 1, "--save-total-limit", 9,
        "--learning-rate", 1e-2, "--train-order", order, "--out",
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = call(*command, whole)
    assert done.code == 0, done.stderr
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    lengths = [sum(len(stored[row].chosen_token_ids) for row in first) / 2] * 2
    assert [line["lengths/chosen"] for line in (lines[0], lines[3])] == lengths  # in both epochs
    shutil.copytree(whole, cut)
    (cut / "manifest.json").unlink()
    shutil.rmtree(cut / "adapter")
    for path in sorted((cut / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    done = call(*command, cut)
    assert done.code == 0, done.stderr
    assert "resuming after step 1" in done.stderr
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
