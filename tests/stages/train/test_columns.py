"""Pairs and labels by columns: the rows that `examples` makes of the same dataset, by another way."""

from dataclasses import replace
from typing import Any

import pytest

from prefpipe.errors import IdentityError
from prefpipe.ids import ids_digest
from prefpipe.schemas import Dropped, Label, Pair, to_table
from prefpipe.stages.train import columns, examples
from prefpipe.stages.train.mapped import Rows
from tests.stages.train import data

BARE = data.bare_pairs(8)
VALUES = [
    data.with_values(row, [-0.5] * len(row.chosen_token_ids), [-0.25] * len(row.rejected_token_ids), f"ref{n % 2}", "s")
    if n % 3
    else row
    for n, row in enumerate(BARE)
]


def masked(row: Pair) -> Pair:
    """The pair with the first token of its rejected completion not scored, and one value fewer."""
    mask = [False, *[True] * (len(row.rejected_token_ids) - 1)]
    digest = ids_digest(row.prompt_token_ids, row.rejected_token_ids, mask)
    values = None if row.ref_rejected_token_logps is None else row.ref_rejected_token_logps[1:]
    return replace(row, rejected_loss_mask=mask, rejected_ids_digest=digest, ref_rejected_token_logps=values)


PAIRS = [masked(row) if n in (2, 3) else row for n, row in enumerate(VALUES)]


def encoded(
    row_type: Any, rows: list[Any], context: int | None = None
) -> tuple[Rows, dict[str, set[str]], list[Dropped]]:
    dropped: list[Dropped] = []
    (batch,) = to_table(row_type, rows).select(columns.columns(row_type)).combine_chunks().to_batches()
    found, names = columns.encode_columns(row_type, batch, 0, context, dropped)
    return Rows([found]), names, dropped


def test_pairs_and_labels_are_the_rows_that_examples_makes() -> None:
    found, names, dropped = encoded(Pair, PAIRS)
    assert found == examples.from_pairs(PAIRS)
    assert (names, dropped) == ({"reference": {"ref0", "ref1"}, "scorer": {"s"}}, [])
    labels = data.labels_of(VALUES)
    assert encoded(Label, labels)[0] == examples.from_labels(labels)


def test_rows_beyond_the_context_are_in_the_ledger() -> None:
    longest = [len(r.prompt_token_ids) + max(len(r.chosen_token_ids), len(r.rejected_token_ids)) for r in PAIRS]
    context = sorted(longest)[4]
    found, _, dropped = encoded(Pair, PAIRS, context)
    assert found == examples.from_pairs([row for row, tokens in zip(PAIRS, longest, strict=True) if tokens <= context])
    assert [row.id for row in dropped] == [
        r.pair_id for r, tokens in zip(PAIRS, longest, strict=True) if tokens > context
    ]
    assert len(encoded(Pair, PAIRS, 1)[0]) == 0


@pytest.mark.parametrize("row", [2, 5])
@pytest.mark.parametrize("change", ["prompt", "chosen", "rejected", "mask"])
def test_edited_ids_and_masks_are_refused(row: int, change: str) -> None:
    pair = PAIRS[row]
    edited = {
        "prompt": {"prompt_token_ids": [*pair.prompt_token_ids, 7]},
        "chosen": {"chosen_token_ids": [9, *pair.chosen_token_ids[1:]] if pair.chosen_token_ids[0] != 9 else [8]},
        "rejected": {"rejected_token_ids": pair.rejected_token_ids[:-1]},
        "mask": {"chosen_loss_mask": [False, *[True] * (len(pair.chosen_token_ids) - 1)]},
    }[change]
    rows = [*PAIRS[:row], replace(pair, **edited), *PAIRS[row + 1 :]]
    with pytest.raises(IdentityError, match=f"row {pair.pair_id}: the token ids of"):
        encoded(Pair, rows)
