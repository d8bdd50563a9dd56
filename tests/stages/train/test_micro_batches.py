"""Which pairs make a step, how they are packed, and that the cut never changes the gradient."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.config.train import TrainConfig
from prefpipe.stages.train import loop
from prefpipe.stages.train.examples import TrainPair
from prefpipe.stages.train.micro_batches import (
    MicroBatch,
    balanced_batches,
    bank_rows,
    global_batches,
    micro_batches,
    tree_of,
)
from tests.stages.train import data

PROMPTS = st.sampled_from([(1,), (1, 2, 3), (4, 5), (6, 7, 8, 9, 10)])
COMPLETIONS = st.sampled_from([(20,), (21, 22), (23, 24, 25), (26, 27, 28, 29, 30, 31)])


def pair(number: int, prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> TrainPair:
    return TrainPair(f"p{number:03d}", str(chosen), str(rejected), prompt, chosen, rejected, None, None, 1.0)


PAIRS = st.lists(st.tuples(PROMPTS, COMPLETIONS, COMPLETIONS), min_size=1, max_size=12).map(
    lambda rows: [pair(i, *row) for i, row in enumerate(rows)]
)


def prompts(count: int, distinct: int = 7) -> list[tuple[int, ...]]:
    """Prompts of `count` rows, drawn from a few."""
    return [(i * i % distinct,) for i in range(count)]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_an_epoch_holds_every_row_exactly_once(num_pairs: int, size: int, seed: int, epoch: int, together: bool):
    steps = global_batches(prompts(num_pairs), size, seed, epoch, together=together)
    assert sorted(row for step in steps for row in step) == list(range(num_pairs))
    assert all(len(step) == size for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= size


def test_order_is_fixed_by_seed_and_epoch():
    """The same (seed, epoch) gives the same steps in any process; another of either gives another order."""
    batches = lambda seed, epoch: global_batches(prompts(40), 8, seed, epoch, together=False)  # noqa: E731
    first = batches(3, 0)
    assert first == batches(3, 0)
    assert first != batches(3, 1)
    assert first != batches(4, 0)
    order = list(range(40))
    random.Random("3/0").shuffle(order)
    assert [row for step in first for row in step] == order


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([(1,), (1, 2), (2,), (3, 4, 5)]), min_size=1, max_size=40), st.integers(0, 5),
    st.integers(0, 3),
)  # fmt: skip
def test_together_keeps_the_pairs_of_a_prompt_adjacent(rows: list[tuple[int, ...]], seed: int, epoch: int):
    """A permutation in which every prompt is one block; blocks and the rows inside keep the order of the shuffle."""
    apart, together = (
        [row for step in global_batches(rows, 5, seed, epoch, together=flag) for row in step] for flag in (False, True)
    )
    assert sorted(together) == list(range(len(rows)))
    blocks = [rows[row] for row in together]
    changes = sum(a != b for a, b in itertools.pairwise(blocks))
    assert changes == len(set(rows)) - 1
    order = list(dict.fromkeys(rows[row] for row in apart))  # prompts by their first appearance in the shuffle
    assert list(dict.fromkeys(blocks)) == order
    for prompt in order:
        assert [r for r in together if rows[r] == prompt] == [r for r in apart if rows[r] == prompt]


def test_together_shares_more_prompts_in_a_step():
    """16 pairs of 4 prompts in steps of 4: one prompt a step instead of several, one tree instead of several."""
    rows = [(i % 4,) for i in range(16)]
    found = global_batches(rows, 4, seed=0, epoch=0, together=True)
    assert [len({rows[row] for row in step}) for step in found] == [1] * 4
    assert sum(len({rows[r] for r in step}) for step in global_batches(rows, 4, 0, 0, together=False)) > 4


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 3))
def test_balanced_steps_hold_every_row_once_and_both_classes_in_proportion(labels: list[bool], size: int, epoch: int):
    """Any window of the order holds its share of desirable rows to within one."""
    found = balanced_batches(labels, size, 0, epoch)
    assert sorted(row for step in found for row in step) == list(range(len(labels)))
    assert all(len(step) == size for step in found[:-1])
    share = sum(labels) / len(labels)
    for step in found:
        assert abs(sum(labels[row] for row in step) - share * len(step)) <= 1 + 1e-9


def test_balanced_steps_are_shuffled_anew_in_every_epoch_and_fixed_by_the_seed():
    labels = [True] * 30 + [False] * 10
    first = balanced_batches(labels, 8, 3, 0)
    assert first == balanced_batches(labels, 8, 3, 0)
    assert first != balanced_batches(labels, 8, 3, 1)
    assert first != balanced_batches(labels, 8, 4, 0)
    assert [sum(labels[row] for row in step) for step in first] == [6] * 5
    order = [row for step in first for row in step if labels[row]]
    assert order != sorted(order)


def test_bank_rows_are_distinct_fixed_by_seed_and_step_and_reach_every_row():
    assert bank_rows(20, 6, 1, 5) == bank_rows(20, 6, 1, 5)
    assert bank_rows(20, 6, 1, 5) != bank_rows(20, 6, 1, 6)
    assert bank_rows(20, 6, 1, 5) != bank_rows(20, 6, 2, 5)
    seen = {row for step in range(60) for row in bank_rows(20, 6, 1, step)}
    assert seen == set(range(20))
    assert sorted(bank_rows(4, 16, 0, 0)) == [0, 1, 2, 3]
    assert bank_rows(0, 16, 0, 0) == []


def test_a_scored_prompt_leads_every_completion_and_is_computed_once():
    """Prompt 5 6 7, completions 20 and 21 22: tree 5 with 6 7 20 and 6 7 21 22; tokens 3 + 1 + 2, as without."""
    rows = [pair(0, (5, 6, 7), (20,), (21, 22))]
    (micro,) = micro_batches(rows, 100, score_prompt=True)
    (tree,) = micro.trees
    assert (tree.prompt, tree.completions) == ((5,), ((6, 7, 20), (6, 7, 21, 22)))
    assert micro.places == ((0, 1),)
    assert tree.num_tokens == tree_of(rows[0]).num_tokens == 6


def test_the_same_tokens_under_another_mask_are_another_completion():
    """A scored prompt is scored whatever the mask of the completion says."""
    rows = [pair(0, (5, 6), (20, 21), (30,)), replace(pair(1, (5, 6), (20, 21), (30,)), chosen_mask=(False, True))]
    (micro,) = micro_batches(rows, 100)
    assert micro.places == ((0, 1), (2, 1))
    assert micro.trees[0].completions == ((20, 21), (30,), (20, 21))
    assert micro.trees[0].num_scored == [2, 1, 1]
    (micro,) = micro_batches(rows[1:], 100, score_prompt=True)
    assert micro.trees[0].masks == ((True, False, True), None)


def completion(micro: MicroBatch, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and tokens of a completion, counted through all trees."""
    flat = [(tuple(t.prompt), tuple(c)) for t in micro.trees for c in t.completions]
    return flat[number]


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.integers(1, 60))
def test_micro_batches_hold_every_pair_once_and_point_at_its_completions(pairs: list[TrainPair], budget: int):
    found = micro_batches(pairs, budget)
    assert sorted(p.row_id for m in found for p in m.rows) == [p.pair_id for p in pairs]
    for micro in found:
        for own, places in zip(micro.rows, micro.places, strict=True):
            assert [completion(micro, place) for place in places] == [
                (own.prompt_ids, a.token_ids) for a in own.completions
            ]


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.integers(1, 60))
def test_packing_stays_within_the_budget_and_shares_prompts(pairs: list[TrainPair], budget: int):
    """Only a single tree may be above the budget; a prompt has one tree in the step, a completion is in it once."""
    found = micro_batches(pairs, budget)
    for micro in found:
        total = sum(t.num_tokens for t in micro.trees)
        assert total <= budget or len(micro.trees) == 1
    trees = [t for micro in found for t in micro.trees]
    assert len({t.prompt for t in trees}) == len(trees) == len({p.prompt_ids for p in pairs})
    for tree in trees:
        used = {c for p in pairs if p.prompt_ids == tree.prompt for c in (p.chosen, p.rejected)}
        assert sorted(tree.completions) == sorted(used)


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.integers(1, 60), st.randoms(use_true_random=False))
def test_no_two_micro_batches_would_fit_together(pairs: list[TrainPair], budget: int, shuffler: random.Random):
    """Best fit opens a new bin only when nothing fits: the two lightest bins together are above the budget."""
    loads = sorted(sum(t.num_tokens for t in m.trees) for m in micro_batches(pairs, budget))
    if len(loads) > 1:
        assert loads[0] + loads[1] > budget


def test_a_completion_of_several_pairs_is_in_the_tree_once():
    """a > b, a > c, b > c of one prompt: three pairs, three completions, one tree; numbers follow first use."""
    a, b, c = (20,), (21, 22), (23,)
    (micro,) = micro_batches([pair(0, (1, 2), a, b), pair(1, (1, 2), a, c), pair(2, (1, 2), b, c)], 1000)
    assert [t.completions for t in micro.trees] == [(a, b, c)]
    assert micro.places == ((0, 1), (0, 2), (1, 2))


def test_a_completion_of_five_pairs_is_computed_once():
    """best > w0 .. w4 in one step: 6 completions in the tree, the chosen one is number 0 in all five pairs."""
    best, worse = (20, 21, 22), [(30 + n, 21) for n in range(5)]
    pairs = [pair(n, (1, 2), best, w) for n, w in enumerate(worse)]
    (micro,) = micro_batches(pairs, 1000)
    (tree,) = micro.trees
    assert tree.completions == (best, *worse)
    assert micro.places == ((0, 1), (0, 2), (0, 3), (0, 4), (0, 5))
    assert (tree.num_tokens, sum(2 * 2 + 3 + 2 for _ in pairs)) == (2 + 3 + 10, 45)


def test_an_oversize_group_stands_alone():
    """Budget 6: the group of 2 + 3 + 3 = 8 tokens alone, two groups of 1 + 1 + 1 = 3 together."""
    big = pair(0, (1, 2), (3, 4, 5), (6, 7, 8))
    small = [pair(1, (9,), (1,), (2,)), pair(2, (8,), (1,), (2,))]
    assert [[p.row_id for p in m.rows] for m in micro_batches([*small, big], 6)] == [["p000"], ["p001", "p002"]]


def test_the_cut_does_not_depend_on_where_equal_groups_stand():
    """Ties in size are ordered by pair_id: the row order of a step does not matter."""
    pairs = [pair(i, (i + 1,), (50,), (51,)) for i in range(6)]
    cuts = [[[p.row_id for p in m.rows] for m in micro_batches(rows, 6)] for rows in (pairs, pairs[::-1])]
    assert cuts[0] == cuts[1]


def test_gradients_are_the_same_for_every_budget(tiny_model: Path):
    """One step through the real loop with 12 pairs of 5 prompts, cut into 1, several and one-tree micro-batches.

    After the first step Adam's first moment is 0.1 x the (unclipped) gradient: it is compared, relative 1e-5.
    """
    generator = random.Random(0)
    draw = lambda low, high: tuple(generator.randrange(3, 260) for _ in range(generator.randint(low, high)))  # noqa: E731
    prompts = [draw(5, 30) for _ in range(5)]
    pairs = [
        replace(pair(i, prompts[i % 5], draw(1, 20), draw(1, 20)), ref_chosen=(-50.0,), ref_rejected=(-40.0,))
        for i in range(10)
    ]
    pairs += [
        replace(pairs[0], pair_id="p100", rejected=pairs[5].rejected, weight=0.5),
        replace(pairs[1], pair_id="p101", chosen=pairs[6].chosen, weight=1.5),
    ]
    found: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []
    for budget in (10**9, 200, 40):
        config = TrainConfig(
            dtype="float32", train_batch_size=12, max_grad_norm=1e9, max_tokens_per_micro_batch=budget,
            loss_type=("sigmoid", "nll"), loss_weights=(1.0, 0.3),
        )  # fmt: skip
        trainer = data.trainer(data.policy(tiny_model), config)
        (metrics,) = loop.steps(trainer, pairs, 0)
        found.append({k: v.clone() for k, v in trainer.optimizer.state().items() if k.startswith("exp_avg/")})
        losses.append(metrics.values["loss"])
    assert len(micro_batches(pairs, 200)) > 1
    assert len(micro_batches(pairs, 40)) == 5
    whole = torch.cat([v.flatten() for v in found[0].values()])
    assert whole.norm() > 0
    for other in found[1:]:
        difference = torch.cat([v.flatten() for v in other.values()]) - whole
        assert difference.norm() < 1e-5 * whole.norm()
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
