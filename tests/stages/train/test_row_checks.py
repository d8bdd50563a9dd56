"""A column that a loss or the order of rows reads must be there: the first row without it is named."""

from dataclasses import replace
from pathlib import Path

import pytest

from prefpipe.errors import DataError, UsageError
from prefpipe.stages.train import row_checks
from tests.stages.train import data

ROWS = [replace(row, preference_prob=0.8, reward_gap=1.0) for row in data.to_train_pairs(data.bare_pairs(6))]


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize(("loss", "column"), [("soft", "preference_prob"), ("sppo", "preference_prob")])
def test_a_loss_reads_its_column_in_every_row(loss: str, column: str, place: int) -> None:
    objective = data.config(Path("m"), loss_type=(loss,)).objective
    row_checks.columns(objective, ROWS)
    lacking = [*ROWS[:place], replace(ROWS[place], **{column: None}), *ROWS[place + 1 :]]
    with pytest.raises(DataError, match=rf"{column}, which 1 of 6 pairs lack \(first {ROWS[place].row_id}\)"):
        row_checks.columns(objective, lacking)


def test_a_loss_that_reads_none_takes_any_rows() -> None:
    bare = data.to_train_pairs(data.bare_pairs(3))
    row_checks.columns(data.config(Path("m")).objective, bare)
    with pytest.raises(DataError, match="3 of 3 pairs lack"):
        row_checks.columns(data.config(Path("m"), loss_type=("soft",)).objective, bare)


def test_an_order_by_hardness_reads_the_gap(tmp_path: Path) -> None:
    config = data.config(tmp_path, train_order="hardness")
    row_checks.order(config, ROWS)
    with pytest.raises(UsageError, match=rf"2 of 6 pairs have no reward_gap \(first {ROWS[1].row_id}\)"):
        row_checks.order(config, [replace(r, reward_gap=None) if n in (1, 4) else r for n, r in enumerate(ROWS)])
    row_checks.order(data.config(tmp_path), [replace(ROWS[0], reward_gap=None)])
