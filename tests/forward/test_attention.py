"""Tree attention against scaled_dot_product_attention under an explicit mask of who sees whom."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from prefpipe.errors import UsageError
from prefpipe.forward.attention import tree_attention
from prefpipe.forward.layout import Layout, Tree, flatten

HEADS, GROUPS, SIZE = 6, 2, 8
MODULE = torch.nn.Identity()


def trees(num_completions: int) -> list[Tree]:
    """Three trees whose prompts and completions have different lengths, one of a single prompt token."""
    lengths = [3, 1, 7, 4, 2, 5, 9, 6]
    completions = [[0] * n for n in lengths[:num_completions]]
    return [Tree([0] * 5, completions), Tree([0], completions[::-1]), Tree([0] * 11, completions)]


def visible(layout: Layout, window: int | None) -> torch.Tensor:
    """[T, T]: row i sees row j when j is of its own prompt or completion, at a position not after its own.

    With a window w it sees the positions p - w + 1 .. p, as transformers' sliding windows do.
    """
    count = len(layout.input_ids)
    tree, part = torch.empty(count, dtype=torch.long), torch.empty(count, dtype=torch.long)
    for number, span in enumerate(layout.spans):
        tree[span.start : span.start + span.prompt_length] = number
        part[span.start : span.start + span.prompt_length] = -1
        for own, (start, length) in enumerate(span.completions):
            tree[start : start + length] = number
            part[start : start + length] = own
    same_tree = tree[:, None] == tree[None, :]
    prompt_or_own = (part[None, :] == -1) | (part[:, None] == part[None, :])
    ahead = layout.position_ids[:, None] - layout.position_ids[None, :]
    seen = same_tree & prompt_or_own & (ahead >= 0)
    return seen if window is None else seen & (ahead < window)


def tensors(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, count, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 4, 12, 1000])
@pytest.mark.parametrize("num_completions", [1, 2, 8])
def test_equals_masked_attention_in_value_and_gradient(num_completions: int, window: int | None):
    layout = flatten(trees(num_completions))
    query, key, value = tensors(len(layout.input_ids))
    found, weights = tree_attention(
        MODULE, query, key, value, None, tree_spans=layout.spans, scaling=0.2, sliding_window=window
    )
    wide = [t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (key, value)]
    expected = scaled_dot_product_attention(query, *wide, attn_mask=visible(layout, window), scale=0.2).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(found, (query, key, value), slope)
    theirs = torch.autograd.grad(expected, (query, key, value), slope)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_scale_defaults_to_one_over_root_of_the_head_size():
    layout = flatten(trees(2))
    query, key, value = tensors(len(layout.input_ids))
    default, _ = tree_attention(MODULE, query, key, value, None, tree_spans=layout.spans)
    given, _ = tree_attention(MODULE, query, key, value, None, tree_spans=layout.spans, scaling=SIZE**-0.5)
    torch.testing.assert_close(default, given)


def test_finite_differences():
    """All three inputs in float64, grouped heads, a window that cuts into the prompt."""
    layout = flatten([Tree([0, 0, 0], [[0, 0], [0]])])
    query, key, value = (t[..., :3].detach().requires_grad_() for t in tensors(len(layout.input_ids), torch.float64))

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return tree_attention(MODULE, *inputs, None, tree_spans=layout.spans, sliding_window=2)[0]

    assert torch.autograd.gradcheck(run, (query, key, value))


def test_a_completion_is_untouched_by_its_siblings_and_by_other_trees():
    """Completion (3, 2) of the first tree: replacing all but its prompt and itself leaves its output as it was."""
    layout = flatten([Tree([0, 0, 0], [[0, 0], [0, 0]]), Tree([0, 0], [[0]])])
    query, key, value = tensors(len(layout.input_ids))
    before, _ = tree_attention(MODULE, query, key, value, None, tree_spans=layout.spans)
    changed = [t.detach().clone() for t in (query, key, value)]
    for tensor in changed:
        tensor[:, :, 5:] = 1e3
    after, _ = tree_attention(MODULE, *changed, None, tree_spans=layout.spans)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("unsupported", [{"softcap": 50.0}, {"s_aux": torch.zeros(HEADS)}], ids=["softcap", "sinks"])
def test_soft_capping_and_sinks_are_refused(unsupported: dict[str, object]):
    layout = flatten(trees(1))
    query, key, value = tensors(len(layout.input_ids))
    with pytest.raises(UsageError, match="soft-capping or sinks"):
        tree_attention(MODULE, query, key, value, None, tree_spans=layout.spans, **unsupported)
