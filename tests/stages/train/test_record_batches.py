"""A batch and the numbers about its rows; `test_mapped` compares them with the rows for many random ones."""

import numpy as np

from prefpipe.stages.train.examples import TrainCompletion, TrainGroup, TrainLabel
from prefpipe.stages.train.record_batches import SCHEMA, Batch, encode

# The second and third completion share two tokens with the first one; the label has neither values nor a class.
ROWS = [
    TrainGroup("g", (1, 2), tuple(TrainCompletion(f"c{n}", ids, (-1.0,) * len(ids)) for n, ids in
                                  enumerate([(5, 6, 7), (5, 6), (5, 6, 900)])), 2.0, 3),
    TrainLabel("l", (4,), TrainCompletion("c3", (8, 9), None, (False, True)), None, 1.0),
]  # fmt: skip


def test_numbers_by_hand() -> None:
    """2 + 8 tokens less 2 shared ones twice; the label is 1 + 2."""
    batch = Batch(encode(ROWS))
    assert batch.num_tokens().tolist() == [6, 3]
    assert batch.num_scored().tolist() == [8, 1]
    assert batch.largest_id().tolist() == [900, 9]
    assert batch.has_refs().tolist() == [True, False]
    assert batch.desirable().tolist() == [False, False]
    assert np.isnan(batch.gaps()).all()


def test_another_column_of_values_leaves_the_rest() -> None:
    batch = Batch(encode(ROWS))
    others = [TrainGroup("g", (1, 2), ROWS[0].completions, 2.0, 3), ROWS[1].with_ref_logps({"c3": (-2.0,)})]
    filled = batch.with_refs(encode(others)["refs"])
    assert [filled.row(n, with_refs=True) for n in (0, 1)] == others
    assert filled.batch.schema.equals(SCHEMA)
    assert [c.ref_logps for c in batch.row(0, with_refs=False).completions] == [None] * 3
