"""How long a row may be: as long as the settings and the contexts of the models allow. Longer ones are left out."""

from collections.abc import Sequence
from typing import TypeVar

from prefpipe import log
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError
from prefpipe.inputs.tokenised import Limits
from prefpipe.models.encoding import Rules
from prefpipe.models.policy import Policy, context_length
from prefpipe.rows import completions_of, key_of
from prefpipe.schemas import Dropped, KlBank, Label, Pair, RankedGroup

T = TypeVar("T", bound=Pair | Label | RankedGroup | KlBank)


def context_of(models: Sequence[Policy]) -> int | None:
    """How many tokens all of these models take; None where no config says it."""
    return min((n for n in (context_length(m.directory) for m in models) if n is not None), default=None)


def limits(config: TrainConfig, context: int | None) -> Limits:
    """The limits of a row that is read from a file."""
    longest = config.max_length if context is None else min(config.max_length, context)
    return Limits(config.max_prompt_length, longest, config.overlong, Rules.of(config))


def within(rows: list[T], context: int | None, dropped: list[Dropped]) -> list[T]:
    """The rows that `context` tokens hold; the others go to `dropped`. Beyond its context a model has no positions, or
    some that it was not trained on. Raises DataError when no row is left."""
    kept = fitting(rows, context, dropped)
    check_left(len(rows), len(kept), context)
    return kept


def fitting(rows: list[T], context: int | None, dropped: list[Dropped]) -> list[T]:
    """As `within`, for a part of the rows: none may be left."""
    if context is None:
        return rows
    kept: list[T] = []
    for row in rows:
        longest = max(len(c.prompt_token_ids) + len(c.token_ids) for c in completions_of(row))
        if longest <= context:
            kept.append(row)
        else:
            dropped.append(too_long(key_of(row), longest, context))
    return kept


def too_long(key: str, longest: int, context: int) -> Dropped:
    """The entry in the ledger of a row that the context does not hold."""
    detail = f"{longest} tokens in prompt and completion, the model's context is {context}"
    return Dropped(key, "too_long", detail)


def check_left(read: int, kept: int, context: int | None) -> None:
    """Raise DataError when none of the rows that were read is kept."""
    if read and not kept:
        raise DataError(
            f"no row is left: all {read} are longer than the model's context of {context} tokens",
            "train a model with a longer context, or make shorter rows",
        )


def warn(dropped: Sequence[Dropped], context: int | None) -> None:
    """Say how many rows are left out because of their length."""
    overlong = [row for row in dropped if row.reason == "too_long"]
    if overlong:
        log.warn(
            f"{len(overlong)} rows are left out because they are too long (first {overlong[0].id}: "
            f"{overlong[0].detail}); the model's context is {context or 'not known'}, dropped.parquet names the rows"
        )
