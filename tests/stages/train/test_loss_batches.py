"""From token log-probs to what losses read: sums, prefixes, prompts, labels and padded groups, against plain slices."""

from dataclasses import replace
from itertools import compress
from pathlib import Path

import pytest
import torch

from prefpipe.forward.layout import flatten
from prefpipe.stages.train import examples as train_rows
from prefpipe.stages.train.examples import TrainCompletion, TrainGroup, TrainLabel, TrainRow
from prefpipe.stages.train.loss_batches import scores_prompt, to_loss_batch
from prefpipe.stages.train.losses import registry
from prefpipe.stages.train.losses.batch import LabelBatch, Logps, LossBatch, PairBatch, RankBatch
from prefpipe.stages.train.micro_batches import micro_batches
from tests.stages.train import data

PAIRS = [
    replace(p, ref_chosen=(-0.5,) * len(p.chosen), ref_rejected=(-0.25,) * len(p.rejected), weight=1 + i / 8)
    for i, p in enumerate(data.to_train_pairs(data.bare_pairs(6)))
]


def value(position: int, token: int) -> float:
    """A log-prob that depends on where a token stands after its prompt and which one it is; exact in float32."""
    return -(position + 1) / 4 - token / 1024


def made(rows: list[TrainRow], z0: float = 0.0, **changes: object) -> tuple[LossBatch, torch.Tensor, list[TrainRow]]:
    """The batch of one micro-batch, with token log-probs from `value`, counted from the first token of the tree."""
    config = data.config(Path(), **changes)
    (micro,) = micro_batches(rows, 10**6, score_prompt=scores_prompt(config.objective.settings))
    layout = flatten(micro.trees)
    values = [value(i, t) for tree in micro.trees for c in tree.completions for i, t in enumerate(c)]
    batch, weights = to_loss_batch(torch.tensor(values), layout, micro, config.objective.settings, z0)
    return batch, weights, list(micro.rows)


def sums(ids: tuple[int, ...], taken: int | None = None, after: int = 0) -> float:
    return sum(value(after + i, t) for i, t in enumerate(ids[:taken]))


def test_pairs_by_plain_slices():
    batch, weights, rows = made(list(PAIRS))
    assert isinstance(batch, PairBatch)
    for n, row in enumerate(rows):
        for side, completion in zip((batch.chosen, batch.rejected), row.completions, strict=True):
            assert float(side.policy_logps[n]) == pytest.approx(sums(completion.token_ids), rel=1e-6)
            assert float(side.lengths[n]) == len(completion.token_ids)
            assert side.reference_logps is not None
            assert float(side.reference_logps[n]) == sum(completion.ref_logps or ())
    assert weights.tolist() == [row.weight for row in rows]
    assert batch.nll is batch.preference_prob is batch.chosen.policy_prefix_logps is None


def test_prefixes_end_with_the_shorter_side():
    batch, _, rows = made(list(PAIRS), ld_alpha=0.5)
    assert isinstance(batch, PairBatch)
    for n, row in enumerate(rows):
        shorter = min(len(a.token_ids) for a in row.completions)
        for side, completion in zip((batch.chosen, batch.rejected), row.completions, strict=True):
            assert side.policy_prefix_logps is not None
            assert side.reference_prefix_logps is not None
            assert float(side.policy_prefix_logps[n]) == pytest.approx(sums(completion.token_ids, shorter), rel=1e-6)
            assert float(side.reference_prefix_logps[n]) == sum((completion.ref_logps or ())[:shorter])


WPO_LOGPS = {(1, 2, 3): [-1, -0.5, -2], (4, 5, 6, 7): [-2, -1, -0.5, -1.25],
             (1, 2, 3, 4, 5): [-0.25, -1.5, -0.75, -3, -0.1], (6, 7): [-0.9, -2.2]}  # fmt: skip
WPO_SQUARES = {(1, 2, 3): [-0.4, -0.3, -0.9], (4, 5, 6, 7): [-0.8, -0.4, -0.3, -0.7],
               (1, 2, 3, 4, 5): [-0.2, -0.6, -0.5, -1.1, -0.05], (6, 7): [-0.5, -0.9]}  # fmt: skip


def weighted(shift: float) -> list[float]:
    """loss * weight of two pairs: what TRL's own loss code gives for these numbers (its mean is 0.1734223)."""
    pairs: list[TrainRow] = [
        replace(PAIRS[0], prompt_ids=(8, 8), chosen=(1, 2, 3), rejected=(4, 5, 6, 7), weight=1.0,
                ref_chosen=(-4.1, 0.0, 0.0), ref_rejected=(-4.0, 0.0, 0.0, 0.0)),
        replace(PAIRS[1], prompt_ids=(9, 9), chosen=(1, 2, 3, 4, 5), rejected=(6, 7), weight=1.0,
                ref_chosen=(-5.0, *[0.0] * 4), ref_rejected=(-3.6, 0.0)),
    ]  # fmt: skip
    config = data.config(Path(), use_weighting=True)
    (micro,) = micro_batches(pairs, 10**6)
    order = [tuple(completion) for tree in micro.trees for completion in tree.completions]
    values = torch.tensor([[v for ids in order for v in table[ids]] for table in (WPO_LOGPS, WPO_SQUARES)])
    values[1] -= shift
    batch, weights = to_loss_batch(values.requires_grad_(), flatten(micro.trees), micro, config.objective.settings)
    assert not weights.requires_grad
    return (weights * registry.combine(config.objective, batch)).tolist()


def test_wpo_weights_are_trls_until_they_pass_one():
    assert sum(weighted(0.0)) / 2 == pytest.approx(0.1734223, abs=1e-6)
    assert sum(weighted(5.0)) / 2 == pytest.approx(0.6887913, abs=1e-6)  # clamped at 1: the golden value of sigmoid


def test_a_scored_prompt_is_in_the_nll_alone():
    """Its first token has no prediction; completions keep their own sums."""
    batch, _, rows = made(list(PAIRS), loss_type=("nll",), nll_scope="prompt_response")
    assert isinstance(batch, PairBatch)
    assert batch.nll is not None
    for n, row in enumerate(rows):
        rest = row.prompt_ids[1:]
        chosen = row.completions[0].token_ids
        assert float(batch.nll.policy_logps[n]) == pytest.approx(sums(rest + chosen), rel=1e-6)
        assert float(batch.nll.lengths[n]) == len(rest) + len(chosen)
        for side, completion in zip((batch.chosen, batch.rejected), row.completions, strict=True):
            assert float(side.policy_logps[n]) == pytest.approx(sums(completion.token_ids, after=len(rest)), rel=1e-5)


def masks(completion: TrainCompletion) -> tuple[bool, ...]:
    """Scores every other token, the last one among them."""
    size = len(completion.token_ids)
    return tuple((size - 1 - i) % 2 == 0 for i in range(size))


@pytest.mark.parametrize("changes", [{}, {"ld_alpha": 0.5}, {"loss_type": ("nll",), "nll_scope": "prompt_response"}])
def test_lengths_and_sums_are_those_of_the_scored_tokens(changes: dict[str, object]):
    """Pairs, labels and groups: as of completions that hold nothing but their scored tokens."""
    for row in PAIRS:
        chosen, rejected = (masks(c) for c in row.completions)
        masked = replace(row, chosen_mask=chosen, rejected_mask=rejected)
        kept = [
            (tuple(compress(c.token_ids, m)), tuple(compress(c.ref_logps or (), m)))
            for c, m in zip(row.completions, (chosen, rejected), strict=True)
        ]
        masked = replace(masked, ref_chosen=kept[0][1], ref_rejected=kept[1][1])
        bare = replace(row, chosen=kept[0][0], rejected=kept[1][0], ref_chosen=kept[0][1], ref_rejected=kept[1][1])
        assert [c.num_scored for c in masked.completions] == [len(c.token_ids) for c in bare.completions]
        found, expected = (by_token([some], **changes) for some in (masked, bare))
        assert found == expected
        if not changes:
            rows = [TrainLabel("l", r.prompt_ids, r.completions[0], True, 1.0) for r in (masked, bare)]
            assert by_token([rows[0]]) == by_token([rows[1]])
            groups = [TrainGroup("g", r.prompt_ids, r.completions, 1.0) for r in (masked, bare)]
            assert by_token([groups[0]]) == by_token([groups[1]])


def by_token(rows: list[TrainRow], **changes: object) -> dict[str, object]:
    """The tensors of the batch as lists, where the log-prob of a token depends on which one it is."""
    config = data.config(Path(), **changes)
    (micro,) = micro_batches(rows, 10**6, score_prompt=scores_prompt(config.objective.settings))
    layout = flatten(micro.trees)
    values = -(layout.targets[layout.entries] + 1.0) / 1024
    batch, _ = to_loss_batch(values, layout, micro, config.objective.settings)
    sides = [value for value in vars(batch).values() if isinstance(value, Logps)]
    return {
        f"{i}.{k}": None if v is None else v.tolist() for i, side in enumerate(sides) for k, v in vars(side).items()
    }


def test_probabilities_and_gaps_are_there_when_every_pair_has_them():
    graded = [replace(p, preference_prob=0.5 + i / 16, reward_gap=float(i)) for i, p in enumerate(PAIRS)]
    batch, _, rows = made(list(graded))
    assert isinstance(batch, PairBatch)
    assert batch.preference_prob is not None
    assert batch.reward_gap is not None
    by_id = {p.pair_id: p for p in graded}
    assert batch.preference_prob.tolist() == [by_id[r.row_id].preference_prob for r in rows]
    assert batch.reward_gap.tolist() == [by_id[r.row_id].reward_gap for r in rows]
    mixed, _, _ = made([*graded[:3], *PAIRS[3:]])
    assert isinstance(mixed, PairBatch)
    assert mixed.preference_prob is None


def test_labels_and_their_reference_point():
    labels = train_rows.from_labels(data.labels_of(data.bare_pairs(6)))
    batch, _, rows = made(list(labels), z0=0.75)
    assert isinstance(batch, LabelBatch)
    wanted = {row.row_id: row.desirable for row in labels}
    assert batch.desirable.tolist() == [wanted[row.row_id] for row in rows]
    assert float(batch.z0) == 0.75
    assert batch.completion.reference_logps is None
    assert batch.completion.policy_logps.tolist() == pytest.approx(
        [sums(row.completions[0].token_ids) for row in rows], rel=1e-6
    )


def test_groups_of_different_sizes_are_padded():
    groups = train_rows.from_groups(data.groups_of(data.bare_pairs(7, num_prompts=3)))
    batch, _, rows = made(list(groups))
    assert isinstance(batch, RankBatch)
    sizes = [len(row.completions) for row in rows]
    assert sorted(sizes) == [4, 4, 6]
    assert batch.present.sum(-1).tolist() == sizes
    for n, row in enumerate(rows):
        found = batch.completions.policy_logps[n, : sizes[n]].tolist()
        assert found == pytest.approx([sums(a.token_ids) for a in row.completions], rel=1e-6)
