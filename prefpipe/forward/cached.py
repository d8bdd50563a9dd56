"""Rows that grow token by token: their keys and values, and attention over them.

Registered with transformers under NAME, beside the attention over token trees, and for the same models: those that take
their positions as numbers and leave all masks to the attention function. Nothing is padded in the row that a model
computes: prompts lie behind each other, and a step holds one token of every row.

B = rows under way (row b in slot b), H = query heads, G = key/value heads, D = head size, L = the longest row so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from prefpipe.forward import head
from prefpipe.forward.attention import Row, by_products, tree_attention
from prefpipe.forward.layout import Span
from prefpipe.forward.logps import causal_model, decoder

NAME = "prefpipe_cached"
_BLOCK = 64  # tokens by which the cache grows, at least


def register() -> None:
    """Make NAME known to transformers, which builds no mask for it."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)


class Cache:
    """Keys [slots, G, capacity, D] and values of every layer; both sizes grow as rows come and get longer."""

    def __init__(self) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._slots, self._capacity = 0, 0

    def reserve(self, slots: int, length: int) -> None:
        """Room for so many rows of so many tokens."""
        if slots <= self._slots and length <= self._capacity:
            return
        self._slots = max(slots, self._slots)
        if length > self._capacity:
            self._capacity = -(-max(length, self._capacity * 5 // 4) // _BLOCK) * _BLOCK
        self.layers = [(self._grown(keys), self._grown(values)) for keys, values in self.layers]

    def layer(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, which begins with the shapes of the first ones that it makes, [1, G, T, D]."""
        if number == len(self.layers):
            self.layers.append((self._grown(keys[:0, :, :0]), self._grown(values[:0, :, :0])))
        return self.layers[number]

    def copy(self, source: int, target: int, length: int) -> None:
        """The first tokens of one row become those of another."""
        for keys, values in self.layers:
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        """Zeros around what is there: SDPA multiplies what it masks by zero, and memory may hold NaN."""
        new = old.new_zeros(self._slots, old.shape[1], self._capacity, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new


@dataclass(frozen=True)
class _Rules:
    """The attention of a layer, as in `forward.attention`."""

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


class _Pass(Protocol):
    """One forward pass. Its attention layers are told apart by their order, which is the same in every pass."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: _Rules) -> torch.Tensor: ...


def _attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None = None,
    *,
    cached_pass: _Pass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_other: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] -> output [1, T, H, D]."""
    return cached_pass.attend(query, key, value, _Rules(scaling, sliding_window, softcap, s_aux)), None


class _Prompts:
    """Prompts behind each other in one row, each for all slots that sample from it."""

    def __init__(self, cache: Cache, lengths: Sequence[int], slots: Sequence[Sequence[int]]) -> None:
        self._cache, self._slots, self._layer = cache, slots, 0
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self._spans = [Span(end - length, length, ()) for end, length in zip(ends, lengths, strict=True)]
        self._row = Row(self._spans)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: _Rules) -> torch.Tensor:
        stored = self._cache.layer(self._layer, key, value)
        self._layer += 1
        for span, slots in zip(self._spans, self._slots, strict=True):
            for store, new in zip(stored, (key, value), strict=True):
                store[list(slots), :, : span.trunk_length] = new[:, :, span.start : span.start + span.trunk_length]
        return tree_attention(
            torch.nn.Module(), query, key, value, tree_row=self._row, scaling=rules.scaling,
            sliding_window=rules.window, softcap=rules.softcap, s_aux=rules.sinks,
        )[0]  # fmt: skip


class _Step:
    """One more token of every row; `positions` [B] are their places."""

    def __init__(self, cache: Cache, positions: torch.Tensor) -> None:
        self._cache, self._positions, self._layer = cache, positions, 0
        self._rows = torch.arange(len(positions), device=positions.device)
        self._longest = int(positions.max()) + 1
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: _Rules) -> torch.Tensor:
        stored = self._cache.layer(self._layer, key, value)
        self._layer += 1
        for store, new in zip(stored, (key, value), strict=True):
            store[self._rows, :, self._positions] = new[0].transpose(0, 1)
        keys, values = (store[: len(self._rows), :, : self._longest] for store in stored)
        queries = query[0].transpose(0, 1).unsqueeze(2)  # [B, H, 1, D]
        mask = self._mask(rules.window, query.dtype)
        if rules.softcap is not None or rules.sinks is not None:
            out = by_products(queries, keys, values, mask.float(), rules.scaling, rules.softcap, rules.sinks)
        else:  # the query heads of a key/value head as rows of one product
            folded = queries.reshape(len(self._rows), keys.shape[1], -1, queries.shape[3])
            out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=rules.scaling)
        return out.reshape(1, len(self._rows), -1, values.shape[3])

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[B, 1, 1, L]: 0 where a row sees a token, -inf where not; one for all layers of a kind."""
        if (window, dtype) not in self._masks:
            at = self._positions.unsqueeze(1)
            seen = torch.arange(self._longest, device=at.device).unsqueeze(0)
            hidden = seen > at
            if window is not None:
                hidden |= seen <= at - window
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=at.device)
            self._masks[window, dtype] = zeros.masked_fill(hidden, -torch.inf)[:, None, None]
        return self._masks[window, dtype]


class CachedModel:
    """A causal language model (PEFT-wrapped or not) as a function from new tokens to the logits behind them."""

    def __init__(self, policy: torch.nn.Module) -> None:
        register()
        self._causal = causal_model(policy)
        self._cache = Cache()
        self.device = self._causal.device

    @torch.no_grad()
    def prompts(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> torch.Tensor:
        """Prompts of any lengths become the rows of their slots. float32 logits [prompts, V] of what follows them."""
        lengths = list(map(len, prompts))
        self._cache.reserve(1 + max(slot for of_prompt in slots for slot in of_prompt), max(lengths))
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        ends = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return self._logits(self._states(ids, positions, _Prompts(self._cache, lengths, slots))[ends])

    @torch.no_grad()
    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """The next token of every row, in slots 0 to B - 1. float32 logits [B, V] of what follows them."""
        self._cache.reserve(len(tokens), max(positions) + 1)
        places = torch.tensor(positions, device=self.device)
        ids = torch.tensor(tokens, device=self.device)
        return self._logits(self._states(ids, places, _Step(self._cache, places)))

    def copy(self, source: int, target: int, length: int) -> None:
        """The first tokens of one slot become those of another."""
        self._cache.copy(source, target, length)

    def _states(self, ids: torch.Tensor, positions: torch.Tensor, cached_pass: _Pass) -> torch.Tensor:
        """Hidden states [T, width] of a row of tokens [T]."""
        now = self._causal.config._attn_implementation  # pyright: ignore[reportPrivateUsage]  (no public name)
        if now != NAME:  # between two passes somebody has scored
            self._causal.set_attn_implementation(NAME)
        body = decoder(self._causal)
        row = {"input_ids": ids.unsqueeze(0), "position_ids": positions.unsqueeze(0)}
        return body(**row, use_cache=False, cached_pass=cached_pass).last_hidden_state[0]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        output = cast(torch.nn.Linear, self._causal.get_output_embeddings())
        bias = cast(torch.Tensor | None, getattr(output, "bias", None))
        return head.logits(states, output.weight, head.logit_rule(self._causal.config.get_text_config()), bias)
