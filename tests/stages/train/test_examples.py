"""Rows of datasets as rows of training: nothing is lost, and missing values are filled by completion id."""

from dataclasses import replace
from pathlib import Path

from prefpipe.inputs.kl_bank import kl_bank
from prefpipe.stages.train import examples
from prefpipe.stages.train.examples import has_ref_logps
from tests.stages.train import data

BARE = data.bare_pairs(6)


def test_pairs_keep_their_numbers():
    row = replace(BARE[0], preference_prob=0.75, reward_gap=2.5, weight=0.5, ref_chosen_token_logps=[-1.0])
    (found,) = examples.from_pairs([row])
    assert (found.row_id, found.weight, found.preference_prob, found.reward_gap) == (row.pair_id, 0.5, 0.75, 2.5)
    assert [a.completion_id for a in found.completions] == [row.chosen_completion_id, row.rejected_completion_id]
    assert [list(a.token_ids) for a in found.completions] == [row.chosen_token_ids, row.rejected_token_ids]
    assert [a.ref_logps for a in found.completions] == [(-1.0,), None]
    assert not has_ref_logps(found)


def test_labels_and_bank_rows():
    stored = data.labels_of(BARE)
    found = examples.from_labels(stored)
    assert [row.desirable for row in found] == [row.label for row in stored] == [True, False] * 6
    assert [list(row.prompt_ids) for row in found] == [row.prompt_token_ids for row in stored]
    bank = examples.from_bank(kl_bank(stored, 4, 0))
    assert [row.desirable for row in bank] == [None] * 4
    assert all(row.row_id == row.completion.completion_id for row in bank)
    assert not {row.row_id for row in bank} & {row.row_id for row in found}


def test_groups_keep_the_order_of_ranks():
    (stored, *_) = data.groups_of(BARE)
    values = [[float(-i)] * len(ids) for i, ids in enumerate(stored.token_ids)]
    (found,) = examples.from_groups([replace(stored, ref_token_logps=values)])
    assert [a.completion_id for a in found.completions] == stored.completion_ids
    assert [list(a.ref_logps or ()) for a in found.completions] == values
    assert has_ref_logps(found)


def test_missing_values_are_filled_and_others_are_kept(tiny_model: Path):
    known = data.to_train_pairs(data.with_reference(BARE[:1], tiny_model))[0]
    half = replace(known, ref_rejected=None)
    values = {half.chosen_id: (9.0,), half.rejected_id: (8.0,)}
    assert half.with_ref_logps(values) == replace(known, ref_rejected=(8.0,))
    assert not any(a.ref_logps for a in known.with_ref_logps(None).completions)
    (label, *_) = examples.from_labels(data.labels_of(BARE))
    assert label.with_ref_logps({label.row_id: (1.0,)}).completion.ref_logps == (1.0,)
    (group, *_) = examples.from_groups(data.groups_of(BARE))
    filled = group.with_ref_logps({a.completion_id: (float(i),) for i, a in enumerate(group.completions)})
    assert [a.ref_logps for a in filled.completions] == [(float(i),) for i in range(len(group.completions))]
    assert filled.with_ref_logps(None) == group
