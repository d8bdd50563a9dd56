"""What an adapter adds to a linear layer, against the sum written out token by token. vLLM is not imported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.engines.vllm_lora import add_adapter

IN, RANK, SLOTS = 6, 3, 2
Case = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], tuple[int, ...]]


def layer(seed: int, tokens: int, widths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Case:
    """x, A and B of every part of a layer, whose slots hold different adapters."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, IN, generator=draw, dtype=dtype)
    down = [torch.randn(SLOTS, 1, RANK, IN, generator=draw, dtype=dtype) for _ in widths]
    up = [torch.randn(SLOTS, 1, width, RANK, generator=draw, dtype=dtype) for width in widths]
    return x, down, up, widths


def by_token(case: Case, slots: list[int], scale: float) -> torch.Tensor:
    """The definition."""
    x, down, up, widths = case
    y = torch.ones(len(slots), sum(widths), dtype=x.dtype)
    for token, slot in enumerate(slots):
        if slot >= 0:
            y[token] += torch.cat(
                [scale * (b[slot, 0] @ (a[slot, 0] @ x[token])) for a, b in zip(down, up, strict=True)]
            )
    return y


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(0, SLOTS - 1),
    st.lists(st.booleans(), min_size=1, max_size=7),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_only_tokens_of_the_adapter_change(seed: int, slot: int, on: list[bool], widths: list[int]) -> None:
    """q, k and v are one layer with three widths; none, some or all tokens are for the adapter, in either slot."""
    case = layer(seed, len(on), tuple(widths))
    slots = [slot if one else -1 for one in on]
    x, down, up, _ = case
    y = torch.ones(len(on), sum(widths), dtype=x.dtype)
    add_adapter(y, x, torch.tensor(slots), down, up, 0.5, tuple(widths))
    torch.testing.assert_close(y, by_token(case, slots, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_type_of_the_layer_stays(dtype: torch.dtype) -> None:
    """Also for an input of three dimensions, which is seen as rows of tokens."""
    case = layer(1, 4, (5, 2), dtype)
    x, down, up, widths = case
    y = torch.ones(2, 2, sum(widths), dtype=dtype)
    add_adapter(y, x.view(2, 2, IN), torch.tensor([0, -1, 0, 0]), down, up, 2.0, widths)
    exact = by_token((x.double(), [a.double() for a in down], [b.double() for b in up], widths), [0, -1, 0, 0], 2.0)
    torch.testing.assert_close(y.view(4, -1).double(), exact, rtol=0.05, atol=0.1)
    assert y.dtype == dtype
