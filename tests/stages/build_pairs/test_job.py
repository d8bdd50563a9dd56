import polars as pl

from prefpipe.stages.build_pairs.job import counts


def test_counts_by_reason() -> None:
    ledger = pl.DataFrame({"id": ["a", "b", "c"], "reason": ["tie", "empty", "tie"], "detail": [""] * 3})
    assert counts(ledger) == {"empty": 1, "tie": 2}
    assert counts(ledger.clear()) == {}
