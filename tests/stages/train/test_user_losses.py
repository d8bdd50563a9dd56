"""Losses of users: what is called before the first step, and that a right one trains as the built-in one does."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import prefpipe
from prefpipe.config.losses import LossSettings
from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError
from prefpipe.stages.train import examples, user_losses
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.losses import registry
from tests.conftest import Call
from tests.stages.train import data
from tests.stages.train import user as mine
from tests.stages.train.runs import metrics

USER = "tests.stages.train.user"
ROWS = data.bare_pairs(6)
PAIRS = examples.from_pairs([replace(row, preference_prob=0.8) for row in ROWS])
LABELS = examples.from_labels(data.labels_of(ROWS))
GROUPS = examples.from_groups(data.groups_of(ROWS))
FAST = (
    "--dtype", "float32", "--learning-rate", 3e-3, "--train-batch-size", 4, "--lora-r", 2, "--lora-alpha", 4,
)  # fmt: skip


def check(name: str, rows: Sequence[TrainRow], **settings: Any) -> None:
    config = TrainConfig.model_validate({"loss_type": (f"{USER}:{name}",), **settings})
    user_losses.check(config.objective, rows)


@pytest.mark.parametrize(
    ("name", "rows", "settings", "value", "slopes"),
    [
        ("dpo", PAIRS, {"beta": 0.4}, math.log(2), "-0.2 for chosen, +0.2 for rejected"),
        ("dpo", PAIRS, {"ld_alpha": 0.5, "nll_scope": "prompt_response"}, math.log(2), "-0.05 for chosen"),
        ("unpaired", LABELS, {"labels": ("l",), "beta": 0.4}, 0.0, "-0.4 for desirable, +0.4 for undesirable"),
        ("ranked", GROUPS, {"groups": ("g",), "beta": 0.4}, 0.0, "-0.4 for chosen, +0 for rejected"),
    ],
)
def test_its_value_and_slopes_at_the_reference_are_said(
    name: str, rows: Sequence[TrainRow], settings: dict[str, Any], value: float, slopes: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    check(name, rows, **settings)
    said = capsys.readouterr().err
    assert f"loss {USER}:{name}: {abs(value):.4g} where the policy is the reference" in said.replace(
        "-0 where", "0 where"
    )
    assert slopes in said
    assert "warning" not in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mean", r"it returned shape \[\], not \[4\] for 4 rows"),
        ("number", r"it returned float, not \[4\] for 4 rows"),
        ("centred", "the loss of a row depends on the other rows"),
        ("infinite", "a value is not finite within a nat of the reference"),
        ("steep", "a gradient is not finite"),
        ("detached", "what it returned has no gradient"),
        ("graded", "it failed: TypeError"),
        ("leaves", "it failed: SystemExit"),
        ("unpaired", "it failed: AttributeError"),
    ],
)
def test_a_wrong_one_is_refused_before_the_first_step(name: str, words: str) -> None:
    pairs = [*PAIRS[:-1], replace(PAIRS[-1], reward_gap=None)]  # a column that the last row lacks
    with pytest.raises(UsageError, match=rf"loss {USER}:{name} cannot be trained with: {words}"):
        check(name, pairs)


@pytest.mark.parametrize(("name", "words"), [("backwards", "check its sign"), ("flat", "the first step moves nothing")])
def test_an_odd_one_is_warned_of(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(name, PAIRS)
    assert words in capsys.readouterr().err


def test_it_adds_up_with_a_built_in_one() -> None:
    objective = TrainConfig(loss_type=("nll", f"{USER}:dpo"), loss_weights=(0.5, 2.0)).objective
    batch = user_losses._batch(PAIRS[:2], torch.full((2, 2), -3.0), torch.full((2, 2), -3.0), LossSettings())
    both = registry.combine(objective, batch)
    assert both.tolist() == pytest.approx(
        (0.5 * registry.loss("nll", batch, LossSettings()) + 2 * math.log(2)).tolist()
    )
    assert objective.with_reference().names == (f"{USER}:dpo",)


def test_the_bytes_of_its_module_are_part_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "my_loss_for_tests.py"
    source.write_text("def f(batch, settings):\n    return 1\n")
    objective = TrainConfig(loss_type=("my_loss_for_tests:f",)).objective
    first = user_losses.inputs(objective)
    assert first.keys() == {"loss my_loss_for_tests:f"}
    source.write_text("def f(batch, settings):\n    return 2\n")
    assert user_losses.inputs(objective) != first
    assert user_losses.inputs(TrainConfig().objective) == {}


@pytest.mark.slow
def test_dpo_of_a_user_trains_as_dpo(tiny_model: Path, tmp_path: Path, call: Call) -> None:
    """By the command line and by a callable; the same metrics as the built-in loss, and one digest for both."""
    pairs = data.write_pairs(tmp_path / "p", data.with_reference(data.bare_pairs(8), tiny_model))
    for name, loss in {"ours": "sigmoid", "theirs": f"{USER}:dpo"}.items():
        done = call(
            "train", "--model", tiny_model, "--pairs", pairs, "--loss-type", loss, *FAST, "--out", tmp_path / name
        )
        assert done.code == 0, done.stderr
    settings = {"dtype": "float32", "learning_rate": 3e-3, "train_batch_size": 4, "lora_r": 2, "lora_alpha": 4}
    run = prefpipe.train(model=tiny_model, pairs=pairs, loss_type=mine.dpo, out=tmp_path / "api", **settings)
    assert run.digest == prefpipe.load(tmp_path / "theirs").digest
    ours, theirs = (metrics(tmp_path / name) for name in ("ours", "theirs"))
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-6)
    assert theirs[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert run.metrics["loss"].to_list() == [line["loss"] for line in theirs]
    assert prefpipe.report(run).read_text().count("tests.stages.train.user:dpo")
