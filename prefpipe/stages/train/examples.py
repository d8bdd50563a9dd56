"""What training needs of a row of each dataset: a prompt, its completions, their cached log-probs. No tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

from prefpipe.schemas import KlBank, Label, Pair, RankedGroup

Ids = tuple[int, ...]
TokenLogps = tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """A completion: its id, its tokens, and the reference log-prob of every token, or None."""

    completion_id: str
    ids: Ids
    reference: TokenLogps | None


class TrainRow(Protocol):
    """An example of any kind."""

    @property
    def row_id(self) -> str:
        """The key of its dataset."""
        ...

    @property
    def prompt(self) -> Ids:
        """Token ids before the completions."""
        ...

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Its completions; chosen before rejected, best before worst."""
        ...

    @property
    def weight(self) -> float:
        """What its loss is multiplied by."""
        ...

    def with_references(self, values: Mapping[str, TokenLogps] | None) -> Self:
        """The row with the values of its completion ids in place of missing ones; with None, without any values."""
        ...


@dataclass(frozen=True)
class TrainPair:
    """A chosen and a rejected completion. Reference log-probs are per token, or None."""

    pair_id: str
    chosen_id: str
    rejected_id: str
    prompt: Ids
    chosen: Ids
    rejected: Ids
    ref_chosen: TokenLogps | None
    ref_rejected: TokenLogps | None
    weight: float
    preference_prob: float | None = None
    reward_gap: float | None = None

    @property
    def row_id(self) -> str:
        """The pair's key."""
        return self.pair_id

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Chosen, rejected."""
        return (
            Answer(self.chosen_id, self.chosen, self.ref_chosen),
            Answer(self.rejected_id, self.rejected, self.ref_rejected),
        )

    def with_references(self, values: Mapping[str, TokenLogps] | None) -> "TrainPair":
        """Fill what is missing, or forget all."""
        chosen, rejected = (_filled(answer, values) for answer in self.answers)
        return replace(self, ref_chosen=chosen, ref_rejected=rejected)


@dataclass(frozen=True)
class TrainLabel:
    """One completion and whether it is desirable; rows of a KL bank have no label."""

    row_id: str
    prompt: Ids
    answer: Answer
    desirable: bool | None
    weight: float

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The one."""
        return (self.answer,)

    def with_references(self, values: Mapping[str, TokenLogps] | None) -> "TrainLabel":
        """Fill what is missing, or forget all."""
        return replace(self, answer=replace(self.answer, reference=_filled(self.answer, values)))


@dataclass(frozen=True)
class TrainGroup:
    """Completions of one prompt from best to worst."""

    row_id: str
    prompt: Ids
    answers: tuple[Answer, ...]
    weight: float

    def with_references(self, values: Mapping[str, TokenLogps] | None) -> "TrainGroup":
        """Fill what is missing, or forget all."""
        return replace(self, answers=tuple(replace(a, reference=_filled(a, values)) for a in self.answers))


def has_references(row: TrainRow) -> bool:
    """Whether every completion has its cached values."""
    return all(answer.reference is not None for answer in row.answers)


def from_pairs(rows: Sequence[Pair]) -> list[TrainPair]:
    """Rows of the dataset as what training needs of them."""
    return [
        TrainPair(
            row.pair_id,
            row.chosen_completion_id,
            row.rejected_completion_id,
            tuple(row.prompt_token_ids),
            tuple(row.chosen_token_ids),
            tuple(row.rejected_token_ids),
            _optional(row.ref_chosen_token_logps),
            _optional(row.ref_rejected_token_logps),
            row.weight,
            row.preference_prob,
            row.reward_gap,
        )
        for row in rows
    ]


def from_labels(rows: Sequence[Label]) -> list[TrainLabel]:
    """Rows of the dataset as what training needs of them."""
    return [
        TrainLabel(
            row.completion_id,
            tuple(row.prompt_token_ids),
            Answer(row.completion_id, tuple(row.token_ids), _optional(row.ref_token_logps)),
            row.label,
            row.weight,
        )
        for row in rows
    ]


def from_bank(rows: Sequence[KlBank]) -> list[TrainLabel]:
    """Mismatched rows; their values are kept under bank_id, for the completion has others with its own prompt."""
    return [
        TrainLabel(
            row.bank_id,
            tuple(row.prompt_token_ids),
            Answer(row.bank_id, tuple(row.token_ids), _optional(row.ref_token_logps)),
            None,
            1.0,
        )
        for row in rows
    ]


def from_groups(rows: Sequence[RankedGroup]) -> list[TrainGroup]:
    """Rows of the dataset as what training needs of them."""
    return [
        TrainGroup(
            row.prompt_id,
            tuple(row.prompt_token_ids),
            tuple(
                Answer(key, tuple(ids), None if row.ref_token_logps is None else tuple(row.ref_token_logps[i]))
                for i, (key, ids) in enumerate(zip(row.completion_ids, row.token_ids, strict=True))
            ),
            row.weight,
        )
        for row in rows
    ]


def _filled(answer: Answer, values: Mapping[str, TokenLogps] | None) -> TokenLogps | None:
    if values is None:
        return None
    return values[answer.completion_id] if answer.reference is None else answer.reference


def _optional(values: list[float] | None) -> TokenLogps | None:
    return None if values is None else tuple(values)
