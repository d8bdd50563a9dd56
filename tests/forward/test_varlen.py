"""One call of a variable-length kernel against attention tree by tree, with the arguments that each torch has."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from prefpipe.forward.attention import Row, tree_attention
from prefpipe.forward.layout import flatten
from prefpipe.forward.varlen import Kernel
from tests.forward.rows import GROUPS, HEADS, MODULE, SIZE, WINDOWS, same_in_value_and_gradient, tensors, trees

T = torch.Tensor
FULL = (-1, -1)


def by_row(
    query: T, key: T, value: T, offsets: tuple[T, T], longest: tuple[int, int], scale: float | None, left: int
) -> T:
    """What the kernel promises, one row at a time: sequence s has the queries offsets[s]:offsets[s + 1] and keys
    likewise; the causal mask is aligned at the end (bottom right); `left` counts keys before the token's, -1 is no
    limit."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    repeats = query.shape[1] // key.shape[1]
    assert all(each.dtype == torch.int32 for each in offsets)
    queries, keys = (list(itertools.pairwise(each.tolist())) for each in offsets)
    assert longest == tuple(max(b - a for a, b in each) for each in (queries, keys))
    rows: list[T] = []
    for (q_start, q_end), (k_start, k_end) in zip(queries, keys, strict=True):
        for row in range(q_start, q_end):
            at = k_end - (q_end - row)
            first = k_start if left < 0 else max(k_start, at - left)
            k, v = (t[first : at + 1].repeat_interleave(repeats, dim=1) for t in (key, value))
            weights = (torch.einsum("hd,khd->hk", query[row], k) * scale).softmax(-1)
            rows.append(torch.einsum("hk,khd->hd", weights, v))
    return torch.stack(rows)


def same_heads(query: T, key: T) -> None:
    assert query.shape[1] == key.shape[1], "as many key/value heads as query heads"


def of_2_10(
    query: T, key: T, value: T, cu_seq_q: T, cu_seq_k: T, max_q: int, max_k: int, is_causal: bool = False,
    return_aux: Any = None,
) -> T:  # fmt: skip
    """No scale, no window, no groups of heads."""
    same_heads(query, key)
    assert is_causal
    return by_row(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), None, -1)


def of_2_11(
    query: T, key: T, value: T, cu_seq_q: T, cu_seq_k: T, max_q: int, max_k: int, *, return_aux: Any = None,
    scale: float | None = None, window_size: tuple[int, int] = FULL, seqused_k: T | None = None,
) -> T:  # fmt: skip
    """Windows and a scale; no groups of heads, as in later versions again."""
    same_heads(query, key)
    assert window_size[1] == 0
    return by_row(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size[0])


def of_2_12(
    query: T, key: T, value: T, cu_seq_q: T, cu_seq_k: T | None, max_q: int, max_k: int, *, return_aux: Any = None,
    scale: float | None = None, window_size: tuple[int, int] = FULL, enable_gqa: bool = False,
    seqused_k: T | None = None, block_table: T | None = None, num_splits: int | None = None,
) -> T:  # fmt: skip
    """Groups of heads too, where they are asked for."""
    if not enable_gqa:
        same_heads(query, key)
    assert cu_seq_k is not None
    assert window_size[1] == 0
    return by_row(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size[0])


VERSIONS = [of_2_10, of_2_11, of_2_12]


@pytest.mark.parametrize("attend", VERSIONS)
@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_completions", [1, 2, 8])
def test_equals_tree_attention(num_completions: int, window: int | None, shared: int, attend: Callable[..., T]):
    """In value and gradient; the default scale with one of the windows."""
    layout = flatten(trees(num_completions, shared))
    query, key, value = inputs = tensors(len(layout.input_ids))
    row, scaling = Row(layout.spans), 0.2 if window != 4 else None
    kernel = Kernel(attend)
    assert kernel.takes(query, value, window) == (window is None or attend is not of_2_10)
    if not kernel.takes(query, value, window):
        return
    found = kernel(query, key, value, row.plan(query.device), scaling, window)
    expected, _ = tree_attention(MODULE, *inputs, None, tree_row=row, scaling=scaling, sliding_window=window)
    same_in_value_and_gradient(found, expected, inputs)


@pytest.mark.parametrize("attend", VERSIONS)
def test_values_of_another_size_and_heads_without_groups(attend: Callable[..., T]):
    """DeepSeek's MLA: the values of a head are smaller than its keys."""
    layout = flatten(trees(2))
    query, key, value = tensors(len(layout.input_ids))
    inputs = [query[:, :GROUPS], key, value[..., : SIZE - 3]]
    row = Row(layout.spans)
    found = Kernel(attend)(*inputs, row.plan(query.device), 0.3)
    expected, _ = tree_attention(MODULE, *inputs, None, tree_row=row, scaling=0.3)
    assert found.shape == (1, len(layout.input_ids), GROUPS, SIZE - 3)
    same_in_value_and_gradient(found, expected, [query, key, value])


def test_sizes_and_masks_that_it_does_not_take():
    """Tree attention then takes SDPA. A kernel that no longer says how it masks is not called either."""
    kernel = Kernel(of_2_12)
    for size, values, taken in ((128, 128, True), (256, 64, True), (264, 64, False), (64, 72, False), (20, 20, False)):
        query, value = torch.empty(1, HEADS, 3, size), torch.empty(1, GROUPS, 3, values)
        assert kernel.takes(query, value, None) == taken, (size, values)
    query, _, value = tensors(3)
    unknown = Kernel(lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: query)
    assert not unknown.takes(query, value, None)


def test_the_kernel_of_this_torch_has_the_arguments_that_a_mask_needs():
    query, _, value = tensors(3)
    assert Kernel(varlen_attn).takes(query, value, None)


def test_layers_share_the_offsets_of_a_row():
    row = Row(flatten(trees(2)).spans)
    assert row.plan(torch.device("cpu")) is row.plan(torch.device("cpu"))
