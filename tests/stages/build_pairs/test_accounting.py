import polars as pl
import pytest

from prefpipe.errors import PrefpipeError
from prefpipe.stages.build_pairs.accounting import Level, check, count_reasons


def test_what_adds_up_passes() -> None:
    levels = {"completions": Level(5, 3, {"empty": 2}), "pairs": Level(2, 1, {"small_gap": 1})}
    check(levels, ledger_rows=3)
    assert levels["completions"].to_json() == {"in": 5, "out": 3, "dropped": {"empty": 2}}


@pytest.mark.parametrize(
    ("level", "rows", "message"),
    [
        (Level(5, 3, {"empty": 1}), 1, "completions: 5 in, 3 out, 1 dropped"),
        (Level(5, 3, {"empty": 3}), 3, "completions: 5 in, 3 out, 3 dropped"),
        (Level(5, 3, {"empty": 2}), 1, "2 dropped rows are counted, 1 stand in the ledger"),
    ],
)
def test_what_is_lost_on_the_way_is_an_error(level: Level, rows: int, message: str) -> None:
    with pytest.raises(PrefpipeError, match=message):
        check({"completions": level}, rows)


def test_rows_by_reason() -> None:
    ledger = pl.DataFrame({"id": ["a", "b", "c"], "reason": ["tie", "empty", "tie"], "detail": [""] * 3})
    assert count_reasons(ledger) == {"empty": 1, "tie": 2}
    assert count_reasons(ledger.clear()) == {}
