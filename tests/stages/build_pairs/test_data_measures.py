"""The numbers of the data report by hand."""

import random

import polars as pl
import pytest

from prefpipe.stages.build_pairs import data_measures
from tests.stages.build_pairs.measured import facts


def test_numbers_by_hand() -> None:
    """Lengths 3 > 1, 2 < 4, 5 = 5: longer in 1 of 2; ratio 10/10; AUC of {3,2,5} over {1,4,5}: (1 + 1 + 2.5) / 9."""
    few = facts(3, chosen_tokens=[3, 2, 5], rejected_tokens=[1, 4, 5])
    numbers = data_measures.length_bias(few)
    assert numbers == pytest.approx({"chosen_longer": 0.5, "ratio": 1.0, "auc": 4.5 / 9})
    assert data_measures.mean_tokens(few) == pytest.approx(20 / 6)


def test_auc_against_all_comparisons() -> None:
    source = random.Random(3)
    ones, others = ([source.randint(0, 6) for _ in range(n)] for n in (13, 9))
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in ones for b in others)
    assert data_measures.auc(pl.Series(ones), pl.Series(others)) == pytest.approx(won / (13 * 9))


def test_the_sample_is_drawn_by_id() -> None:
    source = random.Random(0)
    rows = 4000
    pairs = pl.DataFrame(
        {
            "pair_id": [f"{source.getrandbits(128):032x}" for _ in range(rows)], "prompt_id": ["p"] * rows,
            "prompt_token_ids": [[1]] * rows, "prompt": [[{"role": "user", "content": "x"}]] * rows,
            **{f"{s}_text": ["t"] * rows for s in ("chosen", "rejected")},
            **{f"{s}_token_ids": [[2]] * rows for s in ("chosen", "rejected")},
        }
    )  # fmt: skip
    assert data_measures.pair_sample(pairs, rows).height == rows
    drawn = data_measures.pair_sample(pairs, 40_000)
    assert 850 < drawn.height < 1150
    assert drawn["pair_id"].max() < "4"  # type: ignore[operator]
