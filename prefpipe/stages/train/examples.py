"""What training needs of a row of a dataset: a prompt, completions, their cached reference log-probs. No tensors.

A pair, a label and a ranked group are different rows of files and one thing to the forward pass: `TrainRow`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

from prefpipe.schemas import Completion, KlBank, Label, Pair, RankedGroup

Ids = tuple[int, ...]
TokenLogps = tuple[float, ...]
RefLogpsById = Mapping[str, TokenLogps]  # completion_id -> the reference log-prob of every token, in nats


@dataclass(frozen=True)
class TrainCompletion:
    """A completion. `ref_logps` has the reference log-prob of every token (nats), or is None where they are missing."""

    completion_id: str
    token_ids: Ids
    ref_logps: TokenLogps | None


class TrainRow(Protocol):
    """An example of any kind."""

    @property
    def row_id(self) -> str:
        """The key in its dataset."""
        ...

    @property
    def prompt_ids(self) -> Ids:
        """Token ids before the completions."""
        ...

    @property
    def completions(self) -> tuple[TrainCompletion, ...]:
        """Its completions; chosen before rejected, best before worst."""
        ...

    @property
    def weight(self) -> float:
        """What its loss is multiplied by."""
        ...

    @property
    def source(self) -> int:
        """The number of its source among those of the settings."""
        ...

    def with_ref_logps(self, values: RefLogpsById | None) -> Self:
        """Fill missing reference log-probs; with None, remove all of them."""
        ...


@dataclass(frozen=True)
class TrainPair:
    """A chosen and a rejected completion: their ids, their token ids, and the reference log-prob of every token."""

    pair_id: str
    chosen_id: str
    rejected_id: str
    prompt_ids: Ids
    chosen: Ids
    rejected: Ids
    ref_chosen: TokenLogps | None
    ref_rejected: TokenLogps | None
    weight: float
    preference_prob: float | None = None
    reward_gap: float | None = None
    source: int = 0

    @property
    def row_id(self) -> str:
        """The pair's key."""
        return self.pair_id

    @property
    def completions(self) -> tuple[TrainCompletion, ...]:
        """Chosen, rejected."""
        return (
            TrainCompletion(self.chosen_id, self.chosen, self.ref_chosen),
            TrainCompletion(self.rejected_id, self.rejected, self.ref_rejected),
        )

    def with_ref_logps(self, values: RefLogpsById | None) -> "TrainPair":
        """Fill missing reference log-probs; with None, remove all of them."""
        chosen, rejected = (_ref_logps(completion, values) for completion in self.completions)
        return replace(self, ref_chosen=chosen, ref_rejected=rejected)


@dataclass(frozen=True)
class TrainLabel:
    """One completion and whether it is desirable; rows of a KL bank have no label."""

    row_id: str
    prompt_ids: Ids
    completion: TrainCompletion
    desirable: bool | None
    weight: float
    source: int = 0

    @property
    def completions(self) -> tuple[TrainCompletion, ...]:
        """The one completion."""
        return (self.completion,)

    def with_ref_logps(self, values: RefLogpsById | None) -> "TrainLabel":
        """Fill missing reference log-probs; with None, remove all of them."""
        return replace(self, completion=_with_ref_logps(self.completion, values))


@dataclass(frozen=True)
class TrainGroup:
    """Completions of one prompt from best to worst."""

    row_id: str
    prompt_ids: Ids
    completions: tuple[TrainCompletion, ...]
    weight: float
    source: int = 0

    def with_ref_logps(self, values: RefLogpsById | None) -> "TrainGroup":
        """Fill missing reference log-probs; with None, remove all of them."""
        return replace(self, completions=tuple(_with_ref_logps(c, values) for c in self.completions))


def has_ref_logps(row: TrainRow) -> bool:
    """Whether every completion has its reference log-probs."""
    return all(completion.ref_logps is not None for completion in row.completions)


def from_pairs(rows: Sequence[Pair]) -> list[TrainPair]:
    """Pairs of a dataset as rows to train on."""
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
    """Labels of a dataset as rows to train on."""
    return [
        TrainLabel(
            row.completion_id,
            tuple(row.prompt_token_ids),
            TrainCompletion(row.completion_id, tuple(row.token_ids), _optional(row.ref_token_logps)),
            row.label,
            row.weight,
        )
        for row in rows
    ]


def from_bank(rows: Sequence[KlBank]) -> list[TrainLabel]:
    """Mismatched rows of a KL bank. Their reference log-probs are kept under the bank_id: under its completion_id the
    same completion has other values, those with its own prompt."""
    return [
        TrainLabel(
            row.bank_id,
            tuple(row.prompt_token_ids),
            TrainCompletion(row.bank_id, tuple(row.token_ids), _optional(row.ref_token_logps)),
            None,
            1.0,
        )
        for row in rows
    ]


def from_completions(rows: Sequence[Completion]) -> list[TrainLabel]:
    """Completions to imitate; they have neither a label nor reference log-probs."""
    return [
        TrainLabel(
            row.completion_id,
            tuple(row.prompt_token_ids),
            TrainCompletion(row.completion_id, tuple(row.token_ids), None),
            None,
            1.0,
        )
        for row in rows
    ]


def from_groups(rows: Sequence[RankedGroup]) -> list[TrainGroup]:
    """Ranked groups of a dataset as rows to train on."""
    return [
        TrainGroup(
            row.prompt_id,
            tuple(row.prompt_token_ids),
            tuple(
                TrainCompletion(key, tuple(ids), _optional(values))
                for key, ids, values in zip(row.completion_ids, row.token_ids, _values_of(row), strict=True)
            ),
            row.weight,
        )
        for row in rows
    ]


def _values_of(row: RankedGroup) -> Sequence[list[float] | None]:
    return row.ref_token_logps or [None] * len(row.completion_ids)


def _with_ref_logps(completion: TrainCompletion, values: RefLogpsById | None) -> TrainCompletion:
    return replace(completion, ref_logps=_ref_logps(completion, values))


def _ref_logps(completion: TrainCompletion, values: RefLogpsById | None) -> TokenLogps | None:
    if values is None:
        return None
    return values[completion.completion_id] if completion.ref_logps is None else completion.ref_logps


def _optional(values: list[float] | None) -> TokenLogps | None:
    return None if values is None else tuple(values)
