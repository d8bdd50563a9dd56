"""Pair rules of a user, right and wrong, for tests of rules by `module:function`."""

from typing import Any

import polars as pl


def best_worst(ranked: Any, config: Any) -> pl.DataFrame:
    """The first pair of the built-in rule of this name, written anew."""
    spans = ranked.spans.filter(pl.col("ties") < pl.col("count"))
    return spans.select(chosen=pl.col("start"), rejected=pl.col("start") + pl.col("count") - 1)


def nothing(ranked: Any, config: Any) -> None:
    """No frame."""


def ids(ranked: Any, config: Any) -> pl.DataFrame:
    """No positions."""
    return pl.DataFrame({"chosen": ["a"], "rejected": ["b"]})


def outside(ranked: Any, config: Any) -> pl.DataFrame:
    """Positions of no row."""
    return pl.DataFrame({"chosen": [0], "rejected": [ranked.flat.height]})


def across(ranked: Any, config: Any) -> pl.DataFrame:
    """Two prompts."""
    return pl.DataFrame({"chosen": [0], "rejected": [ranked.flat.height - 1]})


def turned(ranked: Any, config: Any) -> pl.DataFrame:
    """The worse one chosen."""
    return best_worst(ranked, config).select(chosen="rejected", rejected="chosen")


def twice(ranked: Any, config: Any) -> pl.DataFrame:
    """A pair again."""
    return pl.concat([best_worst(ranked, config)] * 2)


def fails(ranked: Any, config: Any) -> pl.DataFrame:
    """A column that is not there."""
    return ranked.flat.select("no_such_column")


def leaves(ranked: Any, config: Any) -> pl.DataFrame:
    """Ends the process."""
    raise SystemExit(0)
