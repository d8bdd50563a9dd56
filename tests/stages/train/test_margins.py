"""The newest margin of every pair: kept, saved with a checkpoint, written as rows."""

import math
from dataclasses import replace

import pytest

from prefpipe.schemas import Margin, from_table
from prefpipe.stages.train.mapped import Rows
from prefpipe.stages.train.margins import Margins
from prefpipe.stages.train.record_batches import Batch, encode
from tests.stages.train import data

ROWS = data.to_train_pairs(data.bare_pairs(5))


def noted(margins: Margins) -> list[tuple[str, bool, int, float]]:
    return [(m.row_id, m.held_out, m.step, m.margin) for m in from_table(Margin, margins.table())]


def test_the_last_value_of_a_row_counts_and_a_row_without_one_is_left_out() -> None:
    margins = Margins(ROWS[:4], ROWS[4:])
    margins.note(1, {0: 0.5, 1: -0.25}, held_out=False)
    margins.note(3, {1: 2.0, 2: math.nan, 3: math.inf}, held_out=False)
    margins.note(3, {0: 1.0}, held_out=True)
    margins.note(4, {}, held_out=True)
    assert noted(margins) == [
        (ROWS[0].row_id, False, 1, 0.5), (ROWS[1].row_id, False, 3, 2.0), (ROWS[4].row_id, True, 3, 1.0),
    ]  # fmt: skip


def test_a_row_may_be_trained_on_and_held_out() -> None:
    margins = Margins(ROWS[:1], ROWS[:1])
    margins.note(1, {0: 0.5}, held_out=False)
    margins.note(2, {0: 0.75}, held_out=True)
    assert noted(margins) == [(ROWS[0].row_id, False, 1, 0.5), (ROWS[0].row_id, True, 2, 0.75)]


@pytest.mark.parametrize("view", [False, True])
def test_a_row_that_stands_there_twice_has_the_margin_that_was_read_last(view: bool) -> None:
    """Row 1 stands at 1, 3 and 4 (read last at 3), and at 5 in another source; row 0 is read at its second place only,
    row 2 at none."""
    rows = [*(ROWS[n] for n in (0, 1, 0, 1, 1)), replace(ROWS[1], source=1), ROWS[2]]
    margins = Margins(Rows([Batch(encode(rows[:3])), Batch(encode(rows[3:]))]) if view else rows, [])
    margins.note(1, {1: 0.5, 5: 3.0}, held_out=False)
    margins.note(2, {3: 0.25, 4: 0.25}, held_out=False)
    margins.note(3, {2: 1.0, 3: 2.0}, held_out=False)
    found = from_table(Margin, margins.table())
    assert [(m.row_id, m.source, m.step, m.margin) for m in found] == [
        (ROWS[0].row_id, 0, 3, 1.0), (ROWS[1].row_id, 0, 3, 2.0), (ROWS[1].row_id, 1, 1, 3.0),
    ]  # fmt: skip


def test_a_checkpoint_brings_them_back_and_an_older_one_brings_none() -> None:
    before, after, older = (Margins(ROWS, []) for _ in range(3))
    before.note(7, dict.fromkeys(range(5), 0.125), held_out=False)
    after.load_state({"master/weight": before.state()["margins/values"], **before.state()})
    after.note(8, {0: 1.0}, held_out=False)
    assert noted(after)[1:] == noted(before)[1:]
    assert noted(before)[0][2] == 7  # the tensors are not shared
    older.load_state({"master/weight": before.state()["margins/values"]})
    assert noted(older) == []
    older.load_state(Margins(ROWS[:4], []).state())  # of a version that counted a row that stands there twice once
    older.note(9, {4: 1.0}, held_out=False)
    assert noted(older) == [(ROWS[4].row_id, False, 9, 1.0)]


@pytest.mark.parametrize("rows", [[], ROWS])
def test_nothing_noted_is_no_row(rows: list[data.TrainPair]) -> None:
    assert Margins(rows, []).table().num_rows == 0
