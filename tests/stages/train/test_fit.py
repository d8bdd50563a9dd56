"""The run of the loop: its files, its alerts and its evaluations, with and without a run directory."""

from dataclasses import replace
from pathlib import Path

import pytest

from prefpipe.stages.train.fit import fit
from prefpipe.stages.train.inputs import TrainingData, prepare
from prefpipe.stages.train.monitor import diagnostics
from prefpipe.stages.train.monitor.alerts import RULES
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.session import Session
from tests.stages.train import data

NOTHING_WRITTEN = Session(World(0, 1), None)


@pytest.fixture
def training(tiny_model: Path, tmp_path: Path) -> TrainingData:
    rows = data.with_reference(data.bare_pairs(10), tiny_model)
    return prepare(data.config(tiny_model, data.write_pairs(tmp_path / "p", rows)))


def test_without_a_run_directory_nothing_is_written(tiny_model: Path, tmp_path: Path, training: TrainingData):
    config = data.config(tiny_model, num_train_epochs=1, train_batch_size=4)
    trainer = data.trainer(data.policy(tiny_model), config)
    before = sorted(tmp_path.rglob("*"))
    results, alerts, margins = fit(NOTHING_WRITTEN, trainer, training, diagnostics.at_start(RULES, ()))
    assert results == {"steps": 3, "last_step": {}}
    assert list(alerts) == []
    assert margins.table().num_rows == 10
    assert sorted(tmp_path.rglob("*")) == before


def test_warnings_of_the_start_are_alerts_of_the_run(tiny_model: Path, training: TrainingData):
    trainer = data.trainer(data.policy(tiny_model), data.config(tiny_model, train_batch_size=10))
    _, alerts, _ = fit(NOTHING_WRITTEN, trainer, training, diagnostics.at_start(RULES, [("A16", "beta is small")]))
    assert [(alert.rule, alert.level) for alert in alerts] == [("A16", "WARN")]


@pytest.mark.parametrize(
    ("warmup_steps", "batch", "said"),
    [
        (0, 4, None),
        (2, 4, None),
        (3, 4, "in a run of 3: the learning rate rises to 0.75,"),
        (0, 99, "to 0.5,"),
    ],
)
def test_a_warmup_as_long_as_the_run_is_a_warning(
    tiny_model: Path, training: TrainingData, capsys: pytest.CaptureFixture[str], warmup_steps: int, batch: int,
    said: str | None,
):  # fmt: skip
    config = data.config(
        tiny_model, num_train_epochs=1, train_batch_size=batch, warmup_steps=warmup_steps, learning_rate=1.0
    )
    fit(NOTHING_WRITTEN, data.trainer(data.policy(tiny_model), config), training, diagnostics.at_start(RULES, ()))
    err = capsys.readouterr().err
    assert ("the learning rate rises" in err) is (said is not None)
    assert (said or "") in err


def test_evaluations_stop_the_run_when_patience_is_over(tiny_model: Path, training: TrainingData):
    """A learning rate of next to nothing never makes a new best after the first evaluation of a step."""
    config = data.config(
        tiny_model, num_train_epochs=5, train_batch_size=2, learning_rate=1e-12, eval_split=0.2, eval_steps=1,
        early_stopping_patience=2, loss_type=("nll",),
    )  # fmt: skip
    held_out = replace(training, rows=training.rows[:8], eval_rows=training.rows[8:])
    trainer = data.trainer(data.policy(tiny_model), config)
    results, _, _ = fit(NOTHING_WRITTEN, trainer, held_out, diagnostics.at_start(RULES, ()))
    assert results["best"]["metric"] == "eval_loss"
    assert results["best"]["step"] < 20
