"""Rows of trees and the queries, keys and values of their tokens, for tests of attention."""

import torch

from prefpipe.forward.layout import Tree

HEADS, GROUPS, SIZE = 6, 2, 8
MODULE = torch.nn.Identity()
WINDOWS = [None, 1, 4, 12, 1000]


def trees(num_completions: int, shared: int = 0) -> list[Tree]:
    """Three trees whose prompts and completions have different lengths, one of a single prompt token.

    `shared` tokens are the same at the start of every completion; the first of them is nothing but those.
    """
    lengths = [3, 1, 7, 4, 2, 5, 9, 6]
    completions = [[99] * shared + [number] * n for number, n in enumerate(lengths[:num_completions])]
    if shared:
        completions[0] = [99] * shared
    return [Tree([0] * 5, completions), Tree([0], completions[::-1]), Tree([0] * 11, completions)]


def tensors(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, count, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def same_in_value_and_gradient(found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(out, inputs, slope) for out in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
