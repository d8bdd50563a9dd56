"""Hidden states of completions that cannot share a row: rows of their own, in batches of similar lengths.

Shorter rows of a batch are padded on the right, without a mask: a causal model gives a token the same state whatever
follows it, in attention, convolutions and recurrent layers alike, and no state of the padding is read. A model that
breaks this rule shows in the self-test, which runs padded batches. T = tokens of all rows, H = hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

_BATCH_TOKENS = 2048  # of one batch with its padding, if it has more than two rows
_PADDING = 0.05  # as a share of the tokens: two completions then take at most 2.1 times those of their shared row


def batches(lengths: Sequence[int], edges: Sequence[int] = ()) -> list[list[int]]:
    """Numbers of rows that run together, longest first, each row once.

    No batch has rows on both sides of one of the `edges`: lengths beyond which all rows of a batch would be computed in
    another way (longrope).
    """
    found: list[list[int]] = []
    longest = tokens = 0
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        length, size = lengths[row], len(found[-1]) + 1 if found else 1
        fits = size <= 2 or longest * size <= _BATCH_TOKENS
        fits = fits and longest * size <= (1 + _PADDING) * (tokens + length)
        if found and fits and not any(length <= edge < longest for edge in edges):
            found[-1].append(row)
            tokens += length
        else:
            found.append([row])
            longest = tokens = length
    return found


def separate_states(
    body: Callable[..., Sequence[torch.Tensor]],
    rows: Sequence[torch.Tensor],
    numbers: Sequence[Sequence[int]],
    spare: int = 0,
) -> list[torch.Tensor]:
    """What `body` makes of each token of rows of token ids, in their order, such as hidden states [T, H]: one call for
    each of the batches that `numbers` names. A call takes ids [B, L], it gives tensors [B, L, ...]. `spare` more calls
    change no value and no gradient.
    """
    states: dict[int, list[torch.Tensor]] = {}
    for batch in numbers:
        padded = pad_sequence([rows[number] for number in batch], batch_first=True)
        found = body(padded)
        for place, number in enumerate(batch):
            states[number] = [tensor[place, : len(rows[number])] for tensor in found]
    first, *others = (torch.cat(parts) for parts in zip(*(states[row] for row in range(len(rows))), strict=True))
    for _ in range(spare):
        first = first + 0 * body(rows[0][:1].unsqueeze(0))[0].sum()
    return [first, *others]
