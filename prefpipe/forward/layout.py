"""Token trees as one flat row: `[prompt | y1 | ... | yK]` for every group, no padding anywhere.

Positions restart after the prompt for every completion; the first token of each completion is predicted from the
prompt's last state, which all K share. T = tokens in the row, N = completion tokens, C = completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tree:
    """A prompt (at least one token) and its completions (at least one token each)."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens computed when the prompt is shared."""
        return len(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True)
class Span:
    """Where one tree lies in the row: the prompt's start and length, and (start, length) of every completion."""

    start: int
    prompt_length: int
    completions: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """A flat row. input_ids, position_ids [T]; sources [N] are rows whose state predicts targets [N];
    owners [N] say which completion (numbered through all trees) each target belongs to."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    spans: tuple[Span, ...]
    num_completions: int

    def to(self, device: torch.device) -> "Layout":
        """The same layout with its tensors on a device."""
        fields = ("input_ids", "position_ids", "sources", "targets", "owners")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in fields})


def flatten(trees: Sequence[Tree]) -> Layout:
    """Lay trees out in one row. Raises ValueError for an empty prompt or completion."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    spans: list[Span] = []
    owner = 0
    for tree in trees:
        if not tree.prompt or not all(tree.completions):
            raise ValueError("a tree needs a prompt and completions of at least one token")
        start, prompt_length = len(input_ids), len(tree.prompt)
        input_ids += tree.prompt
        position_ids += range(prompt_length)
        completions: list[tuple[int, int]] = []
        for completion in tree.completions:
            begin, length = len(input_ids), len(completion)
            completions.append((begin, length))
            input_ids += completion
            position_ids += range(prompt_length, prompt_length + length)
            sources += [start + prompt_length - 1, *range(begin, begin + length - 1)]
            targets += completion
            owners += [owner] * length
            owner += 1
        spans.append(Span(start, prompt_length, tuple(completions)))
    return Layout(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
        owners=torch.tensor(owners),
        spans=tuple(spans),
        num_completions=owner,
    )
