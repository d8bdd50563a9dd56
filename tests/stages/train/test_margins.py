"""The newest margin of every pair: kept, saved with a checkpoint, written as rows."""

import math

import pytest

from prefpipe.schemas import Margin, from_table
from prefpipe.stages.train.margins import Margins
from prefpipe.stages.train.tally import key_of
from tests.stages.train import data

ROWS = data.to_train_pairs(data.bare_pairs(5))
KEYS = [key_of(row) for row in ROWS]


def noted(margins: Margins) -> list[tuple[str, bool, int, float]]:
    return [(m.row_id, m.held_out, m.step, m.margin) for m in from_table(Margin, margins.table())]


def test_the_last_value_of_a_row_counts_and_a_row_without_one_is_left_out() -> None:
    margins = Margins(ROWS[:4], ROWS[4:])
    margins.note(1, dict(zip(KEYS[:2], (0.5, -0.25), strict=True)), held_out=False)
    margins.note(3, {KEYS[1]: 2.0, KEYS[2]: math.nan, KEYS[3]: math.inf}, held_out=False)
    margins.note(3, {KEYS[4]: 1.0}, held_out=True)
    margins.note(4, {}, held_out=True)
    assert noted(margins) == [
        (ROWS[0].row_id, False, 1, 0.5), (ROWS[1].row_id, False, 3, 2.0), (ROWS[4].row_id, True, 3, 1.0),
    ]  # fmt: skip


def test_a_row_may_be_trained_on_and_held_out() -> None:
    margins = Margins(ROWS[:1], ROWS[:1])
    margins.note(1, {KEYS[0]: 0.5}, held_out=False)
    margins.note(2, {KEYS[0]: 0.75}, held_out=True)
    assert noted(margins) == [(ROWS[0].row_id, False, 1, 0.5), (ROWS[0].row_id, True, 2, 0.75)]


def test_a_checkpoint_brings_them_back_and_an_older_one_brings_none() -> None:
    before, after, older = (Margins(ROWS, []) for _ in range(3))
    before.note(7, dict.fromkeys(KEYS, 0.125), held_out=False)
    after.load_state({"master/weight": before.state()["margins/values"], **before.state()})
    after.note(8, {KEYS[0]: 1.0}, held_out=False)
    assert noted(after)[1:] == noted(before)[1:]
    assert noted(before)[0][2] == 7  # the tensors are not shared
    older.load_state({"master/weight": before.state()["margins/values"]})
    assert noted(older) == []


@pytest.mark.parametrize("rows", [[], ROWS])
def test_nothing_noted_is_no_row(rows: list[data.TrainPair]) -> None:
    assert Margins(rows, []).table().num_rows == 0
