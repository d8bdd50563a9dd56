"""Which pairs make a step, and how a step is cut into micro-batches of token trees. No tensors, no model.

A global batch is G pairs fixed by (seed, epoch, step). Inside it, pairs of one prompt share a tree, so that a prompt
and a completion are computed once however many pairs they are in. Trees are packed under a token budget; since every
micro-batch adds its sum of losses divided by G, the budget never changes the result.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from prefpipe.forward.layout import Tree


@dataclass(frozen=True)
class TrainPair:
    """What training needs of a pair. Reference log-probs are per token, or None."""

    pair_id: str
    chosen_id: str
    rejected_id: str
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    ref_chosen: tuple[float, ...] | None
    ref_rejected: tuple[float, ...] | None
    weight: float


@dataclass(frozen=True)
class MicroBatch:
    """Trees, and for every pair the numbers of its chosen and rejected completion (counted through all trees)."""

    trees: tuple[Tree, ...]
    pairs: tuple[TrainPair, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True)
class _Group:
    tree: Tree
    pairs: tuple[TrainPair, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def global_batches(
    prompts: Sequence[tuple[int, ...]], batch_size: int, seed: int, epoch: int, *, together: bool
) -> list[list[int]]:
    """Row numbers of every step of an epoch; the last step may be smaller.

    `together` draws the pairs of a prompt one after the other, so that they share its forward pass; the price is
    correlated gradients inside a step.
    """
    order = list(range(len(prompts)))
    source = random.Random(f"{seed}/{epoch}")
    source.shuffle(order)
    if together:
        first = {prompt: place for place, prompt in reversed(list(enumerate(prompts[row] for row in order)))}
        order.sort(key=lambda row: first[prompts[row]])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def micro_batches(pairs: Sequence[TrainPair], max_tokens: int) -> list[MicroBatch]:
    """Cut a global batch: best-fit decreasing over prompt groups. A group above the budget stands alone."""
    groups = sorted(_groups(pairs), key=lambda g: (-g.tree.num_tokens, g.pairs[0].pair_id))
    bins: list[list[_Group]] = []
    loads: list[int] = []
    for group in groups:
        fitting = [i for i, load in enumerate(loads) if load + group.tree.num_tokens <= max_tokens]
        if fitting:
            best = max(fitting, key=lambda i: loads[i])
            bins[best].append(group)
            loads[best] += group.tree.num_tokens
        else:
            bins.append([group])
            loads.append(group.tree.num_tokens)
    return [_merge(own) for own in bins]


def _groups(pairs: Sequence[TrainPair]) -> list[_Group]:
    by_prompt: dict[tuple[int, ...], list[TrainPair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    return [_group(prompt, own) for prompt, own in by_prompt.items()]


def _group(prompt: tuple[int, ...], pairs: list[TrainPair]) -> _Group:
    number: dict[tuple[int, ...], int] = {}
    for pair in pairs:
        for completion in (pair.chosen, pair.rejected):
            number.setdefault(completion, len(number))
    chosen, rejected = tuple(number[p.chosen] for p in pairs), tuple(number[p.rejected] for p in pairs)
    return _Group(Tree(prompt, tuple(number)), tuple(pairs), chosen, rejected)


def _merge(groups: list[_Group]) -> MicroBatch:
    chosen: list[int] = []
    rejected: list[int] = []
    offset = 0
    for group in groups:
        chosen += [offset + i for i in group.chosen]
        rejected += [offset + i for i in group.rejected]
        offset += len(group.tree.completions)
    pairs = tuple(p for g in groups for p in g.pairs)
    return MicroBatch(tuple(g.tree for g in groups), pairs, tuple(chosen), tuple(rejected))
