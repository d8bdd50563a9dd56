"""Mismatched rows for KTO's reference point z0: the prompt of one row with the completion of another."""

import random
from collections.abc import Sequence
from typing import Protocol

from prefpipe.errors import DataError
from prefpipe.ids import ids_digest, masked_id
from prefpipe.schemas import KlBank


class Answered(Protocol):
    """What a bank is made of: a label, or what has its ids at hand and its tokens when they are asked for."""

    @property
    def completion_id(self) -> str:
        """Of the completion."""
        ...

    @property
    def prompt_id(self) -> str:
        """Of the prompt."""
        ...

    @property
    def prompt_token_ids(self) -> list[int]:
        """Of the prompt."""
        ...

    @property
    def token_ids(self) -> list[int]:
        """Of the completion."""
        ...

    @property
    def loss_mask(self) -> list[bool] | None:
        """Which tokens of the completion are scored; None: all."""
        ...


def kl_bank(labels: Sequence[Answered], size: int, seed: int) -> list[KlBank]:
    """Up to `size` distinct rows: the prompt of one label with the completion of another, never of the same prompt. The
    order of `labels` does not matter.

    Prompts and completions are used about equally often: the prompts stand in a shuffled circle, and each completion
    goes to the prompt at some distance from the prompt that it answers, then at another distance, until the bank is
    full. Raises DataError with fewer than two prompts.
    """
    rows = sorted(labels, key=lambda row: row.completion_id)
    prompts = sorted({row.prompt_id: row for row in rows}.items(), key=lambda entry: entry[0])
    if len(prompts) < 2:
        raise DataError("KTO needs completions of at least two prompts to estimate its reference point", "add prompts")
    source = random.Random(f"klbank/{seed}")
    for shuffled in (rows, prompts):
        source.shuffle(shuffled)
    place = {prompt_id: i for i, (prompt_id, _) in enumerate(prompts)}
    bank: dict[str, KlBank] = {}
    for distance in source.sample(range(1, len(prompts)), len(prompts) - 1):
        for row in rows:
            if len(bank) >= size:
                return sorted(bank.values(), key=lambda r: r.bank_id)
            prompt_id, prompt = prompts[(place[row.prompt_id] + distance) % len(prompts)]
            bank_row = _bank_row(prompt_id, prompt.prompt_token_ids, row)
            bank.setdefault(bank_row.bank_id, bank_row)
    return sorted(bank.values(), key=lambda r: r.bank_id)


def _bank_row(prompt_id: str, prompt_ids: list[int], row: Answered) -> KlBank:
    return KlBank(
        bank_id=masked_id(prompt_ids, row.token_ids, loss_mask=row.loss_mask),
        prompt_id=prompt_id,
        completion_id=row.completion_id,
        prompt_token_ids=prompt_ids,
        token_ids=row.token_ids,
        ids_digest=ids_digest(prompt_ids, row.token_ids, row.loss_mask),
        ref_logps=None,
        ref_token_logps=None,
        reference=None,
        scorer=None,
        loss_mask=row.loss_mask,
    )
