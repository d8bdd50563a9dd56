"""Attention over token trees: a completion sees its prompt and itself, nothing of its siblings or of other trees.

Registered with transformers under NAME; a model whose attention implementation is NAME takes `tree_spans=` in its
forward call. H = query heads, G = key/value heads, D = head size, P = prompt tokens, R = completion tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from prefpipe.errors import UsageError
from prefpipe.forward.layout import Span

NAME = "prefpipe_tree"


def register() -> None:
    """Make NAME known to transformers; needs no mask of its own."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)


def tree_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    tree_spans: Sequence[Span],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_other: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] -> output [1, T, H, D].

    Raises UsageError for soft-capping and attention sinks, which would be computed wrongly.
    """
    if softcap is not None or s_aux is not None:
        raise UsageError(
            "this model's attention uses soft-capping or sinks, which token trees do not compute",
            "use a model without them (Llama, Qwen, Mistral, SmolLM and most others)",
        )
    repeats = query.shape[1] // key.shape[1]
    pieces: list[torch.Tensor] = []
    for span in tree_spans:
        prompt = slice(span.start, span.start + span.prompt_length)
        pieces.append(_attend(query, key, value, prompt, [prompt], repeats, scaling, sliding_window))
        for start, length in span.completions:
            own = slice(start, start + length)
            pieces.append(_attend(query, key, value, own, [prompt, own], repeats, scaling, sliding_window))
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: slice,
    context: list[slice],
    repeats: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of `rows` over `context`, whose last rows are `rows` themselves. [1, H, R, D]."""
    keys = torch.cat([key[:, :, part] for part in context], dim=2).repeat_interleave(repeats, dim=1)
    values = torch.cat([value[:, :, part] for part in context], dim=2).repeat_interleave(repeats, dim=1)
    queries = query[:, :, rows]
    length, total = queries.shape[2], keys.shape[2]
    if length == total and (window is None or total <= window):
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling)
    mask = _visible(length, total, window, query.device)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)


def _visible(length: int, total: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[length, total] bool: row i stands at position total - length + i; the window counts positions."""
    at = torch.arange(total - length, total, device=device).unsqueeze(1)
    seen = torch.arange(total, device=device).unsqueeze(0)
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)
