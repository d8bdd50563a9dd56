"""Which rows make a step, and how a step is cut into micro-batches of token trees. No tensors, no model.

A global batch is the G rows of one step, fixed by (seed, epoch, step) and the order of the settings. Its rows of one
prompt share a tree, so that a prompt and a completion are computed once however many rows hold them. Trees are packed
into micro-batches under a budget of tokens. Every micro-batch adds its sum of losses divided by G, so that the budget
never changes the result.
"""

import random
from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from prefpipe.forward.layout import Tree, tree_with_masks
from prefpipe.stages.train.examples import Ids, Mask, TrainCompletion, TrainRow
from prefpipe.stages.train.record_batches import Array


@dataclass(frozen=True)
class MicroBatch:
    """Trees that are computed in one forward pass, and the rows that they belong to."""

    trees: tuple[Tree, ...]
    rows: tuple[TrainRow, ...]
    # For every row the numbers of its completions, in its order, counted through the completions of all trees.
    places: tuple[tuple[int, ...], ...]


class Batches(Sequence[list[int]]):
    """The row numbers of every step of an epoch: its `order` of rows, 4 bytes a row, cut where a step asks."""

    def __init__(self, order: Array, size: int) -> None:
        self.order, self._size = order, size

    def __len__(self) -> int:
        return -(-len(self.order) // self._size)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[step] for step in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self._size
        return self.order[start : start + self._size].tolist()

    def __eq__(self, other: object) -> bool:
        """Whether the other sequence has the same steps."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list has none


def shuffled(numbers: Iterable[int], source: random.Random) -> Array:
    """The numbers as `source` shuffles them."""
    order = array("i", np.fromiter(numbers, np.int32).tobytes())
    source.shuffle(order)
    return np.frombuffer(order, np.int32)


def global_batches(
    prompts: Sequence[Hashable],
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    together: bool,
    fixed: Iterable[int] | None = None,
) -> Batches:
    """Row numbers of every step of an epoch, shuffled or in a `fixed` order; the last step may be smaller.

    With `together`, the rows of a prompt follow each other, so that they share its forward pass; the price is
    correlated gradients within a step.
    """
    source = random.Random(f"{seed}/{epoch}")
    order = shuffled(range(len(prompts)), source) if fixed is None else np.fromiter(fixed, np.int32)
    if together:
        numbers: dict[Hashable, int] = {}
        first = [numbers.setdefault(prompts[row], len(numbers)) for row in order.tolist()]
        order = order[np.argsort(np.array(first, np.int32), kind="stable")]
    return Batches(order, batch_size)


def balanced_batches(desirable: Sequence[bool] | Array, batch_size: int, seed: int, epoch: int) -> Batches:
    """Row numbers of every step of an epoch. Each class is shuffled, then both are interleaved at even distances, so
    that a step holds each class in the proportion of the data, rounded up or down: not as many of one as of the other,
    and of a class with less than one row per step none in some steps."""
    source = random.Random(f"{seed}/{epoch}")
    labels = np.asarray(desirable)
    classes = [shuffled(np.flatnonzero(labels == label), source) for label in (True, False)]
    places = np.concatenate([(np.arange(len(rows)) + 0.5) / max(1, len(rows)) for rows in classes])
    rows = np.concatenate(classes)
    return Batches(rows[np.lexsort((rows, places))], batch_size)


def bank_rows(size: int, count: int, seed: int, step: int) -> list[int]:
    """Which of the `size` rows of the bank a step reads: at most `count`, none twice, fixed by (seed, step)."""
    return random.Random(f"bank/{seed}/{step}").sample(range(size), min(count, size))


def micro_batches(rows: Sequence[TrainRow], max_tokens: int, *, score_prompt: bool = False) -> list[MicroBatch]:
    """Cut a global batch: the rows of a prompt stay together, and larger groups find their place first, each in the
    fullest micro-batch that still holds it (best-fit decreasing). A group above the budget stands alone.

    With `score_prompt` the prompt of a tree is its first token only, and the rest of the prompt leads every completion:
    the layout still computes it once, and has its log-probs.
    """
    groups = sorted(_groups(rows, score_prompt), key=lambda g: (-g.trees[0].num_tokens, g.rows[0].row_id))
    bins: list[list[MicroBatch]] = []
    loads: list[int] = []
    for group in groups:
        size = group.trees[0].num_tokens
        fitting = [i for i, load in enumerate(loads) if load + size <= max_tokens]
        if fitting:
            best = max(fitting, key=lambda i: loads[i])
            bins[best].append(group)
            loads[best] += size
        else:
            bins.append([group])
            loads.append(size)
    return [_merge(packed) for packed in bins]


def tree_of(row: TrainRow) -> Tree:
    """The prompt and the completions of one row as a tree."""
    return tree_with_masks(row.prompt_ids, map(_content, row.completions))


def _groups(rows: Sequence[TrainRow], score_prompt: bool) -> list[MicroBatch]:  # noqa: FBT001  (internal)
    by_prompt: dict[tuple[int, ...], list[TrainRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_ids, []).append(row)
    return [_group(prompt, same, score_prompt) for prompt, same in by_prompt.items()]


def _group(prompt: tuple[int, ...], rows: list[TrainRow], score_prompt: bool) -> MicroBatch:  # noqa: FBT001  (internal)
    number: dict[tuple[Ids, Mask | None], int] = {}
    for row in rows:
        for completion in row.completions:
            number.setdefault(_content(completion), len(number))
    places = tuple(tuple(number[_content(completion)] for completion in row.completions) for row in rows)
    tree = tree_with_masks(prompt, number)
    if score_prompt:
        scored = (True,) * (len(prompt) - 1)
        whole = ((prompt[1:] + ids, None if mask is None else scored + mask) for ids, mask in number)
        tree = tree_with_masks(prompt[:1], whole)
    return MicroBatch((tree,), tuple(rows), places)


def _content(completion: TrainCompletion) -> tuple[Ids, Mask | None]:
    return completion.token_ids, completion.mask


def _merge(groups: list[MicroBatch]) -> MicroBatch:
    places: list[tuple[int, ...]] = []
    offset = 0
    for group in groups:
        places += [tuple(offset + i for i in place) for place in group.places]
        offset += len(group.trees[0].completions)
    rows = tuple(row for group in groups for row in group.rows)
    return MicroBatch(tuple(group.trees[0] for group in groups), rows, tuple(places))
