"""Token trees laid out in one row: every index checked by hand, as properties of any trees, and through a model."""

from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.forward import load
from prefpipe.forward.layout import Layout, Span, Tree, common_prefix, flatten, separate, tree_with_masks
from prefpipe.forward.logps import TreeModel, score

TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=6)
FEW = st.lists(st.integers(0, 1), min_size=1, max_size=6)  # of two tokens only: completions often begin alike
TREES = st.lists(
    st.builds(Tree, TOKENS, st.lists(TOKENS, min_size=1, max_size=4))
    | st.builds(Tree, TOKENS, st.lists(FEW, min_size=1, max_size=4)),
    min_size=1, max_size=4,
)  # fmt: skip


def test_two_trees_token_by_token():
    """Row: tree 1 = prompt 10 11 12, completions (20 21), (30); tree 2 = prompt 40, completion (50 51 52).

    index     0  1  2 | 3  4 | 5 || 6 | 7  8  9
    token    10 11 12 |20 21 |30 ||40 |50 51 52
    position  0  1  2 | 3  4 | 3 || 0 | 1  2  3
    The first token of a completion is predicted by its prompt's last row (2, 2, 6), the next by the row before it.
    """
    layout = flatten([Tree([10, 11, 12], [[20, 21], [30]]), Tree([40], [[50, 51, 52]])])
    assert layout.input_ids.tolist() == [10, 11, 12, 20, 21, 30, 40, 50, 51, 52]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]
    assert layout.targets.tolist() == [20, 21, 30, 50, 51, 52]
    assert layout.sources.tolist() == [2, 3, 2, 6, 7, 8]
    assert layout.entries.tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.owners.tolist() == [0, 0, 1, 2, 2, 2]
    assert layout.spans == (Span(0, 3, ((3, 2), (5, 1))), Span(6, 1, ((7, 3),)))
    assert layout.num_completions == 3


def test_a_shared_beginning_is_computed_once():
    """Prompt 10 11, completions (20 21 30), (20 21 40 41): the trunk is 10 11 20 21, then 30, then 40 41.

    index     0  1  2  3 | 4 | 5  6
    token    10 11 20 21 |30 |40 41
    position  0  1  2  3 | 4 | 4  5
    Predictions: 0 = row 1 -> 20, 1 = row 2 -> 21, 2 = row 3 -> 30, 3 = row 3 -> 40, 4 = row 5 -> 41.
    """
    tree = Tree([10, 11], [[20, 21, 30], [20, 21, 40, 41]])
    layout = flatten([tree])
    assert (tree.num_shared, tree.num_tokens, tree.num_logical_tokens) == (2, 7, 2 * 2 + 3 + 4)
    assert layout.input_ids.tolist() == [10, 11, 20, 21, 30, 40, 41]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert layout.sources.tolist() == [1, 2, 3, 3, 5]
    assert layout.targets.tolist() == [20, 21, 30, 40, 41]
    assert layout.entries.tolist() == [0, 1, 2, 0, 1, 3, 4]
    assert layout.owners.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert layout.spans == (Span(0, 4, ((4, 1), (5, 2))),)


def test_a_completion_that_begins_another_has_no_part_of_its_own():
    """(20 21) begins (20 21 30): the trunk ends with 21, the first has length 0 after it."""
    layout = flatten([Tree([10], [[20, 21], [20, 21, 30]]), Tree([40], [[50]])])
    assert layout.input_ids.tolist() == [10, 20, 21, 30, 40, 50]
    assert layout.spans == (Span(0, 3, ((3, 0), (3, 1))), Span(4, 1, ((5, 1),)))
    assert layout.sources.tolist() == [0, 1, 2, 4]
    assert layout.targets.tolist() == [20, 21, 30, 50]
    assert layout.entries.tolist() == [0, 1, 0, 1, 2, 3]
    assert layout.owners.tolist() == [0, 0, 1, 1, 1, 2]


def test_identical_completions_are_one_row_of_which_each_has_its_values():
    tree = Tree([10], [[20, 21]] * 3)
    layout = flatten([tree])
    assert (tree.num_shared, tree.num_tokens, tree.num_logical_tokens) == (2, 3, 9)
    assert layout.input_ids.tolist() == [10, 20, 21]
    assert layout.entries.tolist() == [0, 1] * 3
    assert layout.owners.tolist() == [0, 0, 1, 1, 2, 2]
    assert layout.spans == (Span(0, 3, ((3, 0),) * 3),)


def test_one_completion_alone_is_its_own_part():
    """Nothing is shared, so that separate rows and trees of one completion are the same layout."""
    tree = Tree([10], [[20, 21]])
    assert (tree.num_shared, tree.num_tokens, tree.num_logical_tokens) == (0, 3, 3)
    assert flatten([tree]).spans == (Span(0, 1, ((1, 2),)),)
    assert separate([Tree([10], [[20], [30]]), tree]) == [
        Tree([10], ([20],)),
        Tree([10], ([30],)),
        Tree([10], ([20, 21],)),
    ]


@pytest.mark.parametrize(
    ("sequences", "length"),
    [([[1, 2]], 2), ([[1, 2], [1, 2, 3]], 2), ([[1, 2], [1, 3]], 1), ([[1], [2]], 0), ([[1, 5, 2], [1, 4, 2]], 1)],
)
def test_common_prefix(sequences: list[list[int]], length: int):
    assert common_prefix(sequences) == length


@pytest.mark.parametrize(
    "tree",
    [Tree([], [[1]]), Tree([1], [[]]), Tree([1], [[2], []]), Tree([1], [])],
    ids=["prompt", "completion", "second completion", "no completion"],
)
def test_empty_prompt_or_completion_is_refused(tree: Tree):
    with pytest.raises(ValueError, match="at least one token"):
        flatten([Tree([1], [[2]]), tree])


def test_to_moves_every_tensor_and_keeps_the_rest():
    layout = flatten([Tree([1, 2], [[3]])])
    moved = layout.to(torch.device("meta"))
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 6
    assert all(t.device.type == "meta" for t in tensors)
    assert (moved.spans, moved.num_completions) == (layout.spans, layout.num_completions)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_sources_targets_and_owners_are_consistent(trees: list[Tree]):
    """Against the definition, completion by completion: what the row holds, who predicts what, at which position."""
    layout = flatten(trees)
    assert len(layout.input_ids) == len(layout.position_ids) == sum(t.num_tokens for t in trees)
    completions = [c for tree in trees for c in tree.completions]
    prompts = [tree.prompt for tree in trees for _ in tree.completions]
    assert layout.num_completions == len(completions)
    assert len(layout.entries) == len(layout.owners) == sum(map(len, completions))
    assert len(layout.targets) == len(layout.sources)
    assert sorted(set(layout.entries.tolist())) == list(range(len(layout.targets)))  # no prediction is made for nothing
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        mine = layout.entries[layout.owners == number]
        sources = layout.sources[mine]
        assert layout.targets[mine].tolist() == list(completion)
        assert layout.input_ids[sources].tolist() == [prompt[-1], *completion[:-1]]
        begin = len(prompt) - 1
        assert layout.position_ids[sources].tolist() == list(range(begin, begin + len(completion)))


def test_nothing_predicts_a_token_that_is_not_scored():
    """Completions (20 21 30) and (20 21 40) share 20 21 in the trunk; the first scores 21 and 30, the second 20 and 40.
    All tokens stay in the row; 20 is predicted for the second alone."""
    layout = flatten([Tree([10], [[20, 21, 30], [20, 21, 40]], [[False, True, True], [True, False, True]])])
    assert layout.input_ids.tolist() == [10, 20, 21, 30, 40]
    assert layout.sources.tolist() == [0, 1, 2, 2]
    assert layout.targets.tolist() == [20, 21, 30, 40]
    assert layout.entries.tolist() == [1, 2, 0, 3]
    assert layout.owners.tolist() == [0, 0, 1, 1]
    assert layout.spans == (Span(0, 3, ((3, 1), (4, 1))),)
    apart = flatten([Tree([10], [[20, 21, 30]], [[False, False, True]]), Tree([40], [[50]])])
    assert (apart.sources.tolist(), apart.targets.tolist()) == ([2, 4], [30, 50])


@pytest.mark.parametrize("mask", [[True], [False, False], [True, True, True]])
def test_a_mask_fits_its_completion_and_scores_a_token(mask: list[bool]):
    with pytest.raises(ValueError, match="a value for every token"):
        flatten([Tree([1], [[2, 3]], [mask])])


def with_masks(data: st.DataObject, tree: Tree) -> Tree:
    """Random masks, some of them None; each scores its last token."""
    masks = [
        data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n).map(lambda m: [*m[:-1], True]))
        for n in map(len, tree.completions)
    ]
    return tree_with_masks(tree.prompt, zip(tree.completions, masks, strict=True))


def kept(values: Sequence[float], mask: Sequence[bool] | None) -> list[float]:
    return list(values if mask is None else compress(values, mask))


@settings(max_examples=60, deadline=None)
@given(trees=TREES, data=st.data())
def test_log_probs_with_masks_are_those_of_the_scored_tokens(model: TreeModel, trees: list[Tree], data: st.DataObject):
    """The same values as without masks, whatever is shared; separate rows keep the masks."""
    masked = [with_masks(data, tree) for tree in trees]
    expected = [
        kept(values, mask)
        for tree, found in zip(masked, score(model, trees), strict=True)
        for values, mask in zip(found, tree.masks or [None] * len(found), strict=True)
    ]
    assert [n for tree in masked for n in tree.num_scored] == list(map(len, expected))
    for some in (masked, separate(masked)):
        found = [completion for tree in score(model, some) for completion in tree]
        assert list(map(len, found)) == list(map(len, expected))
        flat = [torch.tensor([v for completion in side for v in completion]) for side in (found, expected)]
        torch.testing.assert_close(*flat, rtol=0, atol=2e-5)


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_spans_cover_every_row_once_and_hold_the_trees(trees: list[Tree]):
    """The trunk and a completion's own part together are the prompt and the completion."""
    layout = flatten(trees)
    covered: list[int] = []
    for tree, span in zip(trees, layout.spans, strict=True):
        rows = range(span.start, span.start + span.trunk_length)
        trunk = layout.input_ids[list(rows)].tolist()
        assert trunk[: len(tree.prompt)] == list(tree.prompt)
        covered += rows
        for completion, (start, length) in zip(tree.completions, span.completions, strict=True):
            own = range(start, start + length)
            assert [*trunk, *layout.input_ids[list(own)].tolist()] == [*tree.prompt, *completion]
            assert layout.position_ids[list(own)].tolist() == list(range(len(trunk), len(trunk) + length))
            covered += own
    assert covered == list(range(len(layout.input_ids)))


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_token_counts(trees: list[Tree]):
    """What a tree computes is never more than separate rows, and at least its longest row."""
    for tree in trees:
        assert tree.num_logical_tokens == sum(len(tree.prompt) + len(c) for c in tree.completions)
        assert len(tree.prompt) + max(map(len, tree.completions)) <= tree.num_tokens <= tree.num_logical_tokens
        assert tree.num_tokens == len(flatten([tree]).input_ids)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> TreeModel:
    return TreeModel(load.load_model(tiny_model, "float32"))


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 260, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def values(model: TreeModel, trees: list[Tree]) -> torch.Tensor:
    return torch.tensor([v for tree in score(model, trees) for completion in tree for v in completion])


@settings(max_examples=25, deadline=None)
@given(trees=TREES)
def test_log_probs_do_not_depend_on_what_is_shared(model: TreeModel, trees: list[Tree]):
    """Trees as they are, and every completion in a tree of its own: the same values in the same order."""
    torch.testing.assert_close(values(model, trees), values(model, separate(trees)), rtol=0, atol=2e-5)


LONG = ids(40, 9)
PATHOLOGICAL = {
    "one token": [Tree(ids(5, 0), [[7]])],
    "one-token prompt, one-token completions": [Tree([4], [[7], [8], [9]])],
    "identical": [Tree(ids(5, 0), [ids(6, 1)] * 4)],
    "identical, one token": [Tree(ids(5, 0), [[7], [7]])],
    "each begins the next": [Tree(ids(5, 0), [LONG[:n] for n in (1, 2, 3, 20, 40)])],
    "K = 64": [Tree(ids(5, 0), [ids(1 + n % 7, n) for n in range(64)])],
    "K = 64, alike for 20 tokens": [Tree(ids(5, 0), [[*LONG[:20], *ids(1 + n % 7, n)] for n in range(64)])],
    "a long prompt, short completions": [Tree(ids(400, 2), [[5], [6, 7]])],
    "all of these": [],
}
PATHOLOGICAL["all of these"] = [tree for trees in PATHOLOGICAL.values() for tree in trees]


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_pathological_groups(model: TreeModel, name: str):
    """Values and gradient (of the embedding: every path through the row) equal those of separate rows."""
    trees = PATHOLOGICAL[name]
    torch.testing.assert_close(values(model, trees), values(model, separate(trees)), rtol=0, atol=2e-5)
    embedding = model.policy.get_input_embeddings().weight
    embedding.requires_grad_()
    try:
        layouts: list[Layout] = [flatten(trees), flatten(separate(trees))]
        logps = [model(layout) for layout in layouts]
        slope = torch.randn(logps[0].shape, generator=torch.Generator().manual_seed(0))
        shared, apart = (torch.autograd.grad((v * slope).sum(), embedding)[0] for v in logps)
    finally:
        embedding.requires_grad_(requires_grad=False)
    assert (shared - apart).norm() <= 1e-5 * apart.norm()


def test_a_tree_above_the_scoring_budget_is_scored_alone(model: TreeModel):
    """A budget of 64 tokens, prompts of 400 and 5: the same values as in one pass."""
    trees = PATHOLOGICAL["all of these"]
    small = torch.tensor([v for tree in score(model, trees, 64) for completion in tree for v in completion])
    torch.testing.assert_close(small, values(model, trees), rtol=0, atol=2e-5)
