"""Token trees as one flat row: `[trunk | y1 | ... | yK]` for every group, no padding anywhere.

The trunk is the prompt and the longest token prefix that all completions share. Behind it lies the rest of every
completion; its positions go on from the trunk, and its first token is predicted from the last state of the trunk.
Nothing predicts a token that is not scored, such as a tool's result inside an answer: it is context for later ones.
T = tokens in the row, U = distinct predictions, N = scored tokens (a shared one counts K times), C = completions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from prefpipe.ids import common_prefix


@dataclass(frozen=True)
class Tree:
    """A prompt (at least one token) and its completions (at least one token each). `masks` say which tokens of a
    completion are scored; None, and no masks at all, stand for every one."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    masks: Sequence[Sequence[bool] | None] = ()

    @property
    def num_scored(self) -> list[int]:
        """Scored tokens of every completion."""
        lengths = list(map(len, self.completions))
        return [n if m is None else sum(m) for n, m in zip(lengths, self.masks, strict=True)] if self.masks else lengths

    @property
    def num_logical_tokens(self) -> int:
        """Tokens that separate rows would compute: the prompt once for every completion."""
        return len(self.prompt) * len(self.completions) + sum(map(len, self.completions))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.prompt) + max(map(len, self.completions))

    @property
    def num_shared(self) -> int:
        """Tokens at the start of the completions that are equal in all of them."""
        return common_prefix(self.completions) if len(self.completions) > 1 else 0

    @property
    def num_tokens(self) -> int:
        """Tokens that a row computes for this tree."""
        return len(self.prompt) + sum(map(len, self.completions)) - self.num_shared * (len(self.completions) - 1)


@dataclass(frozen=True)
class Span:
    """Where a tree lies in the row: start and length of the trunk, (start, length) of every completion behind it."""

    start: int
    trunk_length: int
    completions: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """A flat row."""

    # [T]: the tokens.
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    # [U]: the state at sources[u] predicts the token targets[u].
    sources: torch.Tensor
    targets: torch.Tensor
    # [N]: for every scored token the number of its prediction, and of its completion, counted through all trees.
    entries: torch.Tensor
    owners: torch.Tensor
    spans: tuple[Span, ...]
    num_completions: int

    def to(self, device: torch.device) -> "Layout":
        """The same layout with its tensors on a device."""
        fields = ("input_ids", "position_ids", "sources", "targets", "entries", "owners")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in fields})


def flatten(trees: Sequence[Tree]) -> Layout:
    """Lay trees out in one row. Raises ValueError for an empty prompt or completion, and for a mask of another length
    or without a scored token."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    entries: list[int] = []
    owners: list[int] = []
    spans: list[Span] = []
    owner = 0
    for tree in trees:
        if not tree.prompt or not tree.completions or not all(tree.completions):
            raise ValueError("a tree needs a prompt and completions of at least one token")
        shared = tree.num_shared
        start, trunk_length = len(input_ids), len(tree.prompt) + shared
        trunk_end = start + trunk_length - 1
        input_ids += [*tree.prompt, *tree.completions[0][:shared]]
        position_ids += range(trunk_length)
        common = range(len(sources), len(sources) + shared)
        sources += range(start + len(tree.prompt) - 1, trunk_end)
        targets += tree.completions[0][:shared]
        parts: list[tuple[int, int]] = []
        for completion in tree.completions:
            rest = completion[shared:]
            begin, length = len(input_ids), len(rest)
            parts.append((begin, length))
            input_ids += rest
            position_ids += range(trunk_length, trunk_length + length)
            entries += [*common, *range(len(sources), len(sources) + length)]
            sources += [trunk_end, *range(begin, begin + length - 1)][:length]
            targets += rest
            owners += [owner] * len(completion)
            owner += 1
        spans.append(Span(start, trunk_length, tuple(parts)))
    layout = Layout(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
        entries=torch.tensor(entries),
        owners=torch.tensor(owners),
        spans=tuple(spans),
        num_completions=owner,
    )
    return _scored(layout, trees) if any(tree.masks for tree in trees) else layout


def separate(trees: Sequence[Tree]) -> list[Tree]:
    """A tree for every completion, in their order: nothing is shared."""
    return [
        tree_with_masks(tree.prompt, [(completion, mask)])
        for tree in trees
        for completion, mask in zip(tree.completions, _masks(tree), strict=True)
    ]


def tree_with_masks(prompt: Sequence[int], completions: Iterable[tuple[Sequence[int], Sequence[bool] | None]]) -> Tree:
    """The tree of a prompt and completions with their masks."""
    ids, masks = zip(*completions, strict=True)
    return Tree(prompt, ids, masks if any(mask is not None for mask in masks) else ())


def _masks(tree: Tree) -> Sequence[Sequence[bool] | None]:
    return tree.masks or [None] * len(tree.completions)


def _scored(layout: Layout, trees: Sequence[Tree]) -> Layout:
    """The layout without the predictions of tokens that no completion scores."""
    scored: list[bool] = []
    for tree in trees:
        for completion, mask in zip(tree.completions, _masks(tree), strict=True):
            if mask is not None and (len(mask) != len(completion) or not any(mask)):
                raise ValueError("a mask has a value for every token of its completion, and scores one at least")
            scored += [True] * len(completion) if mask is None else mask
    kept = torch.tensor(scored)
    used, entries = layout.entries[kept].unique(return_inverse=True)
    return replace(
        layout,
        sources=layout.sources[used],
        targets=layout.targets[used],
        entries=entries,
        owners=layout.owners[kept],
    )
