"""Attention over token trees: a completion sees its trunk and itself, nothing of its siblings or of other trees.

Registered with transformers under NAME; a model whose attention implementation is NAME takes `tree_spans=` in its
forward call. Three exact ways to compute it: PyTorch's variable-length kernel (CUDA, 16 bit), SDPA per tree (everywhere
else), and plain matrix products where the model caps its scores or has attention sinks, which neither kernel knows.
H = query heads, G = key/value heads, D = head size, T = tokens in the row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from prefpipe.errors import UsageError
from prefpipe.forward.layout import Span

NAME = "prefpipe_tree"
Kernel = Callable[..., Any]
_Masks = dict[tuple[int, int, int, torch.dtype], torch.Tensor]  # by length, total, repeats, dtype


def register() -> None:
    """Make NAME known to transformers; it needs no mask of transformers' making."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)


def why_not_shared(config: PreTrainedConfig) -> str | None:
    """Why completions of this model cannot share a row, or None: then the self-test has the last word."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    rules = [r for r in (rope, *rope.values()) if isinstance(r, dict)]
    layers = set(getattr(text, "layer_types", None) or ())
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        return "its attention bias (ALiBi) counts rows, not positions"
    if text.model_type in ("mamba", "mamba2", "rwkv", "recurrent_gemma", "xlstm") or layers - _ATTENTION_LAYERS:
        return "it has recurrent layers, whose state would run from one completion into the next"
    if any("mrope_section" in r for r in rules):
        return "its positions have several axes (M-RoPE)"
    if any(r.get("rope_type") == "longrope" for r in rules):
        return "its rotary frequencies depend on the longest position in the row (longrope)"
    return None


def check_positions(config: PreTrainedConfig) -> None:
    """Raise UsageError for rotary frequencies that grow with what was computed before: no value would be repeatable."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if any(r.get("rope_type") == "dynamic" for r in (rope, *rope.values()) if isinstance(r, dict)):
        raise UsageError(
            "this model's rotary embedding (dynamic NTK) depends on the longest sequence seen so far",
            "set a fixed rope_type (such as yarn or linear) in its config.json",
        )


_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class _Rules:
    """What a model's attention does beside softmax(q k^T * scaling): GQA repeats, window, score cap, sinks [H]; and the
    masks of the row that were made so far."""

    repeats: int
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    masks: _Masks


def tree_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None = None,  # or in _other, by its name: the spans say it all
    *,
    tree_spans: Sequence[Span],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_other: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] -> output [1, T, H, D]."""
    plain = softcap is None and s_aux is None
    masks = _masks(tuple(tree_spans), sliding_window, query.device)
    rules = _Rules(query.shape[1] // key.shape[1], scaling, sliding_window, softcap, s_aux, masks)
    if plain and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] <= 256:
        return variable_length(query, key, value, tuple(tree_spans), rules.scaling, rules.window, varlen_attn), None
    pieces: list[torch.Tensor] = []
    for span in tree_spans:
        trunk = slice(span.start, span.start + span.trunk_length)
        pieces.append(_attend(query, key, value, [trunk], rules))
        for start, length in span.completions:
            if length:
                pieces.append(_attend(query, key, value, [trunk, slice(start, start + length)], rules))
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: tuple[Span, ...],
    scaling: float | None,
    window: int | None,
    kernel: Kernel,
) -> torch.Tensor:
    """The same through one call of a variable-length kernel: queries stay in place, every completion's keys are the
    trunk's and its own, copied together; the kernel aligns the causal mask at the end. Output [1, T, H, D]."""
    plan = _plan(spans)
    device = query.device
    rows = plan.key_rows.to(device)
    out = kernel(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1)[rows],
        value[0].transpose(0, 1)[rows],
        plan.query_offsets.to(device),
        plan.key_offsets.to(device),
        plan.longest_query,
        plan.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.unsqueeze(0)


@dataclass(frozen=True)
class _Plan:
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    key_rows: torch.Tensor
    longest_query: int
    longest_key: int


@lru_cache(maxsize=8)
def _plan(spans: tuple[Span, ...]) -> _Plan:
    """Offsets of the kernel's sequences; made once per row, used by every layer."""
    lengths: list[tuple[int, int]] = []
    rows: list[int] = []
    for span in spans:
        trunk = range(span.start, span.start + span.trunk_length)
        for start, length in ((span.start, span.trunk_length), *span.completions):
            own = range(start, start + length)
            if length:
                keys = [*trunk] if start == span.start else [*trunk, *own]
                rows += keys
                lengths.append((length, len(keys)))
    offsets = torch.tensor([(0, 0), *lengths]).cumsum(0).to(torch.int32)
    longest_query, longest_key = (max(pair[i] for pair in lengths) for i in (0, 1))
    return _Plan(offsets[:, 0].contiguous(), offsets[:, 1].contiguous(), torch.tensor(rows), longest_query, longest_key)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: list[slice], rules: _Rules
) -> torch.Tensor:
    """Causal attention of the last slice over all slices of `context`. [1, H, R, D]."""
    queries = query[:, :, context[-1]]
    keys, values = (_joined(tensor, context) for tensor in (key, value))
    length, total = queries.shape[2], keys.shape[2]
    if rules.softcap is not None or rules.sinks is not None:
        return _by_products(queries, keys, values, rules)
    if rules.repeats == 1 and length == total and (rules.window is None or total <= rules.window):
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=rules.scaling)
    # The query heads of a group stand one below the other as further rows: repeating keys and values for them would
    # copy both, and autograd would keep the copies.
    folded = queries.reshape(1, keys.shape[1], rules.repeats * length, queries.shape[3])
    mask = _bias(length, total, rules, rules.repeats, query)
    out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=rules.scaling)
    return out.reshape(queries.shape)


def _joined(tensor: torch.Tensor, context: list[slice]) -> torch.Tensor:
    parts = [tensor[:, :, part] for part in context]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _by_products(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Scores capped by cap * tanh(score / cap) (Gemma 2), and a sink per head that takes weight and gives nothing
    (gpt-oss); softmax in float32, as these models' own code has it."""
    keys, values = (tensor.repeat_interleave(rules.repeats, dim=1) for tensor in (keys, values))
    scale = rules.scaling if rules.scaling is not None else queries.shape[-1] ** -0.5
    scores = queries @ keys.transpose(2, 3) * scale
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    scores = scores.float()
    scores = scores + _bias(*scores.shape[2:], rules, 1, scores)
    if rules.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = rules.sinks.float().reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values


@lru_cache(maxsize=4)
def _masks(_spans: tuple[Span, ...], _window: int | None, _device: torch.device) -> _Masks:
    """Where the layers of one forward pass (and its recomputation) share the masks of a row. Only the last rows stay:
    a mask has length * total numbers, those of a long prompt fill gigabytes."""
    return {}


def _bias(length: int, total: int, rules: _Rules, repeats: int, scores: torch.Tensor) -> torch.Tensor:
    """[repeats * length, total]: 0 where a row sees, -inf where not. Row i stands at position total - length + i, the
    rows of every further head of a group below; the window counts positions. One tensor serves all layers, in the
    dtype of the scores: SDPA would turn a boolean mask into such a tensor in every layer, and autograd keep them."""
    key = (length, total, repeats, scores.dtype)
    if key not in rules.masks:
        at = torch.arange(total - length, total, device=scores.device).unsqueeze(1)
        seen = torch.arange(total, device=scores.device).unsqueeze(0)
        visible = seen <= at
        if rules.window is not None:
            visible &= seen > at - rules.window
        zeros = torch.zeros(length, total, dtype=scores.dtype, device=scores.device)
        rules.masks[key] = zeros.masked_fill(~visible, -torch.inf).repeat(repeats, 1)
    return rules.masks[key]
