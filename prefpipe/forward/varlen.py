"""Attention over token trees by one call of PyTorch's variable-length kernel, whatever arguments its version takes.

`torch.nn.attention.varlen.varlen_attn` of 2.10 has `is_causal` and neither windows nor a scale; later ones have
`window_size` and `scale`; some have `enable_gqa`, and those without it expect as many key/value heads as query heads.
H = query heads, G = key/value heads, D = head size of queries and keys, E = head size of values, T = tokens of the
row, R = copied keys.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from prefpipe.forward.layout import Span

_LARGEST_HEAD, _HEAD_STEP = 256, 8  # sizes that FlashAttention, which computes it, has kernels for


@dataclass(frozen=True)
class Plan:
    """The sequences of a row for the kernel, a trunk or a completion each: where their queries and keys begin [S + 1],
    which rows the keys are copied from [R], and the longest of each."""

    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    key_rows: torch.Tensor
    longest_query: int
    longest_key: int


def plan(spans: Sequence[Span], device: torch.device) -> Plan:
    """The queries of a sequence stay where they are; its keys are those of its trunk and, behind them, its own."""
    lengths: list[tuple[int, int]] = []
    rows: list[torch.Tensor] = []
    for span in spans:
        trunk = torch.arange(span.start, span.start + span.trunk_length)
        lengths.append((span.trunk_length, span.trunk_length))
        rows.append(trunk)
        for start, length in span.completions:
            if length:
                lengths.append((length, span.trunk_length + length))
                rows += [trunk, torch.arange(start, start + length)]
    offsets = torch.tensor([(0, 0), *lengths]).cumsum(0).to(device, torch.int32)
    longest_query, longest_key = (max(pair[i] for pair in lengths) for i in (0, 1))
    return Plan(
        offsets[:, 0].contiguous(), offsets[:, 1].contiguous(), torch.cat(rows).to(device), longest_query, longest_key
    )


class Kernel:
    """A variable-length kernel behind the arguments that it has: `attend` is `varlen_attn` of some version of torch."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        self._attend = attend
        self.arguments = frozenset(inspect.signature(attend).parameters)

    def takes(self, query: torch.Tensor, value: torch.Tensor, window: int | None) -> bool:
        """Whether it computes a causal mask with this window over query [1, H, T, D] and value [1, G, T, E]."""
        mask = "window_size" in self.arguments or (window is None and "is_causal" in self.arguments)
        size = query.shape[3]
        return mask and value.shape[3] <= size <= _LARGEST_HEAD and size % _HEAD_STEP == 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan,
        scaling: float | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """query [1, H, T, D], key [1, G, T, D], value [1, G, T, E] -> output [1, T, H, E].

        The kernel aligns the causal mask at the end of the keys. It takes one head size, so that smaller values get
        zeros at their end.
        """
        size = value.shape[3]
        if size < query.shape[3]:
            value = pad(value, (0, query.shape[3] - size))
        queries = query[0].transpose(0, 1).contiguous()
        keys, values = (tensor[0].transpose(0, 1)[plan.key_rows] for tensor in (key, value))
        options: dict[str, Any] = {}
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1 and "enable_gqa" in self.arguments:
            options["enable_gqa"] = True
        elif repeats > 1:
            keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
        if scaling is not None and "scale" in self.arguments:
            options["scale"] = scaling
        elif scaling is not None:
            queries = queries * (scaling * query.shape[3] ** 0.5)
        if "window_size" in self.arguments:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            options["is_causal"] = True
        out = self._attend(
            queries,
            keys,
            values,
            plan.query_offsets,
            plan.key_offsets,
            plan.longest_query,
            plan.longest_key,
            **options,
        )
        return out[..., :size].unsqueeze(0)
