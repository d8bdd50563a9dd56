"""Token trees laid out in one row: every index checked by hand, and as properties of any trees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.forward.layout import Span, Tree, flatten

TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=6)
TREES = st.lists(st.builds(Tree, TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=4)


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
    assert layout.owners.tolist() == [0, 0, 1, 2, 2, 2]
    assert layout.spans == (Span(0, 3, ((3, 2), (5, 1))), Span(6, 1, ((7, 3),)))
    assert layout.num_completions == 3


@pytest.mark.parametrize(
    "tree", [Tree([], [[1]]), Tree([1], [[]]), Tree([1], [[2], []])], ids=["prompt", "completion", "second completion"]
)
def test_empty_prompt_or_completion_is_refused(tree: Tree):
    with pytest.raises(ValueError, match="at least one token"):
        flatten([Tree([1], [[2]]), tree])


def test_to_moves_every_tensor_and_keeps_the_rest():
    layout = flatten([Tree([1, 2], [[3]])])
    moved = layout.to(torch.device("meta"))
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 5
    assert all(t.device.type == "meta" for t in tensors)
    assert (moved.spans, moved.num_completions) == (layout.spans, layout.num_completions)


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_sources_targets_and_owners_are_consistent(trees: list[Tree]):
    """Against the definition, completion by completion: what the row holds, who predicts what, at which position."""
    layout = flatten(trees)
    assert len(layout.input_ids) == len(layout.position_ids) == sum(t.num_tokens for t in trees)
    completions = [c for tree in trees for c in tree.completions]
    prompts = [tree.prompt for tree in trees for _ in tree.completions]
    assert layout.num_completions == len(completions)
    assert len(layout.targets) == len(layout.sources) == len(layout.owners) == sum(map(len, completions))
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        mine = layout.owners == number
        sources = layout.sources[mine]
        assert layout.targets[mine].tolist() == list(completion)
        assert layout.input_ids[sources].tolist() == [prompt[-1], *completion[:-1]]
        begin = len(prompt) - 1
        assert layout.position_ids[sources].tolist() == list(range(begin, begin + len(completion)))


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_spans_cover_every_row_once_and_hold_the_trees(trees: list[Tree]):
    layout = flatten(trees)
    covered: list[int] = []
    for tree, span in zip(trees, layout.spans, strict=True):
        rows = range(span.start, span.start + span.prompt_length)
        assert layout.input_ids[list(rows)].tolist() == list(tree.prompt)
        covered += rows
        for completion, (start, length) in zip(tree.completions, span.completions, strict=True):
            assert layout.input_ids[start : start + length].tolist() == list(completion)
            covered += range(start, start + length)
    assert covered == list(range(len(layout.input_ids)))
