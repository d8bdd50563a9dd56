"""Attention over token trees: a completion sees its trunk and itself, nothing of its siblings or of other trees.

Registered with transformers under NAME; a model whose attention implementation is NAME takes `tree_row=` in its
forward call. Three exact ways compute it: PyTorch's variable-length kernel (`varlen`; CUDA, 16 bits), SDPA tree by
tree (everywhere else), and plain matrix products where the model caps its scores or has attention sinks, which neither
kernel supports.

H = query heads, G = key/value heads, D = head size of queries and keys, E = head size of values (another one in
DeepSeek's MLA, else D), T = tokens of the row, R = tokens of one tree or completion.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from prefpipe.errors import UsageError
from prefpipe.forward import varlen
from prefpipe.forward.layout import Span

NAME = "prefpipe_tree"
KERNEL = varlen.Kernel(varlen_attn)
# Queries of a block on a CPU, and blocks of a trunk or completion: each adds gradients of all keys that it sees.
_BLOCK, _MOST_BLOCKS = 128, 8


def register() -> None:
    """Make NAME known to transformers, which builds no mask for it: the row says who sees whom."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)


def why_not_shared(config: PreTrainedConfig) -> str | None:
    """Why completions of this model cannot share a row; None where no reason is known, and the self-test decides."""
    text, rules = config.get_text_config(), _rotary_rules(config)
    layers = set(getattr(text, "layer_types", None) or ())
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        return "its attention bias (ALiBi) counts rows, not positions"
    unknown = layers - _ATTENTION_LAYERS
    sparse = {layer for layer in unknown if layer.endswith("_attention") and "linear" not in layer}
    if text.model_type in ("mamba", "mamba2", "rwkv", "recurrent_gemma", "xlstm") or unknown - sparse:
        return "it has recurrent layers, whose state would run from one completion into the next"
    if sparse:
        return f"its {', '.join(sorted(sparse))} chooses tokens by their places in the row"
    if any("mrope_section" in r for r in rules):
        return "its positions have several axes (M-RoPE)"
    if longrope_edges(config):
        return "its rotary frequencies depend on the longest position in the row (longrope)"
    return None


def longrope_edges(config: PreTrainedConfig) -> list[int]:
    """The lengths beyond which a longrope model turns to its long frequencies, for all rows of a batch; mostly none."""
    return [r["original_max_position_embeddings"] for r in _rotary_rules(config) if r.get("rope_type") == "longrope"]


def check_positions(config: PreTrainedConfig) -> None:
    """Raise UsageError for rotary frequencies that depend on earlier sequences: no value would be repeatable."""
    if any(r.get("rope_type") == "dynamic" for r in _rotary_rules(config)):
        raise UsageError(
            "this model's rotary embedding (dynamic NTK) depends on the longest sequence seen so far",
            "set a fixed rope_type (such as yarn or linear) in its config.json",
        )


def _rotary_rules(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """What the config says of rotary embeddings, for all layers or by their kind."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [rule for rule in (rope, *rope.values()) if isinstance(rule, dict)]


_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class Row:
    """The trees of a row, and the masks and offsets that all layers of its forward pass share.

    One `Row` serves one forward pass. It lives as long as that pass and the backward that may compute it again, and its
    masks with it: a mask has length x total numbers, and those of a long prompt fill gigabytes. (Not a dataclass or a
    dict: torch would rebuild those between layers.)
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        self._masks: dict[tuple[object, ...], torch.Tensor] = {}
        self._plans: dict[torch.device, varlen.Plan] = {}

    def plan(self, device: torch.device) -> varlen.Plan:
        """Offsets for the variable-length kernel, copied to a device once for all layers on it."""
        if device not in self._plans:
            self._plans[device] = varlen.plan(self.spans, device)
        return self._plans[device]

    def mask(self, length: int, total: int, repeats: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[repeats * length, total]: 0 where a query sees a key, -inf where not, in dtype and on device of `like`.

        Query i of `length` stands at position total - length + i; the window counts positions; the queries of the
        further heads of a group lie below. SDPA would turn a boolean mask into such a tensor in every layer, and
        autograd would keep them all.
        """
        key = (length, total, repeats, window, like.dtype, like.device)
        if key not in self._masks:
            at = torch.arange(total - length, total, device=like.device).unsqueeze(1)
            seen = torch.arange(total, device=like.device).unsqueeze(0)
            visible = seen <= at
            if window is not None:
                visible &= seen > at - window
            zeros = torch.zeros(length, total, dtype=like.dtype, device=like.device)
            self._masks[key] = zeros.masked_fill(~visible, -torch.inf).repeat(repeats, 1)
        return self._masks[key]


@dataclass(frozen=True)
class _Rules:
    """The attention of a layer, beside softmax(q k^T * scaling) v."""

    row: Row
    # Query heads per key/value head (GQA).
    repeats: int
    scaling: float | None
    # How many positions back a token sees, itself included.
    window: int | None
    # Scores become cap * tanh(score / cap).
    softcap: float | None
    # Per query head [H] the score of a sink, which takes weight and has no value.
    sinks: torch.Tensor | None


def tree_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None = None,  # or in _other, by its name: the row says who sees whom
    *,
    tree_row: Row,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_other: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key [1, G, T, D], value [1, G, T, E] -> output [1, T, H, E]."""
    plain = softcap is None and s_aux is None
    by_kernel = plain and not query.is_cpu and query.dtype in (torch.bfloat16, torch.float16)
    if by_kernel and KERNEL.takes(query, value, sliding_window):
        return KERNEL(query, key, value, tree_row.plan(query.device), scaling, sliding_window), None
    rules = _Rules(tree_row, query.shape[1] // key.shape[1], scaling, sliding_window, softcap, s_aux)
    pieces: list[torch.Tensor] = []
    for span in tree_row.spans:
        trunk = slice(span.start, span.start + span.trunk_length)
        pieces += _attend(query, key, value, [trunk], rules)
        for start, length in span.completions:
            if length:
                pieces += _attend(query, key, value, [trunk, slice(start, start + length)], rules)
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: list[slice], rules: _Rules
) -> list[torch.Tensor]:
    """Causal attention of the last slice of `context` over all of them: pieces [1, H, ., E], one after the other."""
    queries = query[:, :, context[-1]]
    keys, values = (_joined(tensor, context) for tensor in (key, value))
    length, total = queries.shape[2], keys.shape[2]
    if rules.softcap is not None or rules.sinks is not None:
        mask = rules.row.mask(length, total, 1, rules.window, queries.new_empty(0, dtype=torch.float32))
        return [by_products(queries, keys, values, mask, rules.scaling, rules.softcap, rules.sinks)]
    if query.is_cpu and length >= 2 * _BLOCK:
        return list(_in_blocks(queries, keys, values, rules))
    if rules.repeats == 1 and length == total and (rules.window is None or total <= rules.window):
        return [scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=rules.scaling)]
    return [_masked(queries, keys, values, rules)]


def _in_blocks(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rules: _Rules
) -> Iterator[torch.Tensor]:
    """`_masked` of some queries at a time, each over the keys that it may see. A CPU computes what a mask hides: of a
    long trunk about half."""
    length, total = queries.shape[2], keys.shape[2]
    block = max(_BLOCK, -(-length // _MOST_BLOCKS))
    for start in range(0, length, block):
        end = min(start + block, length)
        first = 0 if rules.window is None else max(0, total - length + start - rules.window + 1)
        seen = slice(first, total - length + end)
        yield _masked(queries[:, :, start:end], keys[:, :, seen], values[:, :, seen], rules)


def _masked(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Attention under a mask, [1, H, R, E]. The query heads of one key/value group are stacked as extra rows. To repeat
    keys and values for them would copy both, and autograd would keep the copies."""
    length, total = queries.shape[2], keys.shape[2]
    folded = queries.reshape(1, keys.shape[1], rules.repeats * length, queries.shape[3])
    mask = rules.row.mask(length, total, rules.repeats, rules.window, queries)
    out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=rules.scaling)
    return out.reshape(*queries.shape[:3], values.shape[3])


def _joined(tensor: torch.Tensor, context: list[slice]) -> torch.Tensor:
    parts = [tensor[:, :, part] for part in context]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def by_products(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention [B, H, R, E] with capped scores (Gemma 2) or with a sink per head (gpt-oss); softmax in float32, as in
    the code of these models. queries [B, H, R, D], keys and values per key/value head, mask float32."""
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
    scale = scaling if scaling is not None else queries.shape[-1] ** -0.5
    scores = queries @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float() + mask
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        columns = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, columns], dim=-1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values
