"""What training needs of a row of a dataset: a prompt, completions, their cached reference log-probs. No tensors.

A pair, a label and a ranked group are different rows of files and one thing to the forward pass: `TrainRow`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar

from prefpipe.schemas import Completion, KlBank, Label, Pair, RankedGroup

T = TypeVar("T")
Ids = tuple[int, ...]
Mask = tuple[bool, ...]  # which tokens of a completion are scored
TokenLogps = tuple[float, ...]
RefLogpsById = Mapping[str, TokenLogps]  # completion_id -> the reference log-prob of every scored token, in nats


@dataclass(frozen=True)
class TrainCompletion:
    """A completion. `ref_logps` has the reference log-prob of every scored token (nats), or is None where they are
    missing; without a `mask` every token is scored."""

    completion_id: str
    token_ids: Ids
    ref_logps: TokenLogps | None
    mask: Mask | None = None

    @property
    def num_scored(self) -> int:
        """How many tokens are scored: the length of the completion for every loss and metric."""
        return len(self.token_ids) if self.mask is None else sum(self.mask)


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
    """A chosen and a rejected completion: their ids, their token ids, the reference log-prob of every scored token."""

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
    chosen_mask: Mask | None = None
    rejected_mask: Mask | None = None

    @property
    def row_id(self) -> str:
        """The pair's key."""
        return self.pair_id

    @property
    def completions(self) -> tuple[TrainCompletion, ...]:
        """Chosen, rejected."""
        return (
            TrainCompletion(self.chosen_id, self.chosen, self.ref_chosen, self.chosen_mask),
            TrainCompletion(self.rejected_id, self.rejected, self.ref_rejected, self.rejected_mask),
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
            chosen_mask=_optional(row.chosen_loss_mask),
            rejected_mask=_optional(row.rejected_loss_mask),
        )
        for row in rows
    ]


def from_labels(rows: Sequence[Label]) -> list[TrainLabel]:
    """Labels of a dataset as rows to train on."""
    return [_label(row.completion_id, row, row.ref_token_logps, row.label, row.weight) for row in rows]


def from_bank(rows: Sequence[KlBank]) -> list[TrainLabel]:
    """Mismatched rows of a KL bank. Their reference log-probs are kept under the bank_id: under its completion_id the
    same completion has other values, those with its own prompt."""
    return [_label(row.bank_id, row, row.ref_token_logps) for row in rows]


def from_completions(rows: Sequence[Completion]) -> list[TrainLabel]:
    """Completions to imitate; they have neither a label nor reference log-probs."""
    return [_label(row.completion_id, row, None) for row in rows]


def _label(
    key: str,
    row: Label | KlBank | Completion,
    ref_logps: list[float] | None,
    desirable: bool | None = None,  # noqa: FBT001  (a column)
    weight: float = 1.0,
) -> TrainLabel:
    completion = _completion(key, row.token_ids, ref_logps, row.loss_mask)
    return TrainLabel(key, tuple(row.prompt_token_ids), completion, desirable, weight)


def from_groups(rows: Sequence[RankedGroup]) -> list[TrainGroup]:
    """Ranked groups of a dataset as rows to train on."""
    return [
        TrainGroup(
            row.prompt_id,
            tuple(row.prompt_token_ids),
            tuple(map(_completion, row.completion_ids, row.token_ids, *_values_and_masks(row))),
            row.weight,
        )
        for row in rows
    ]


def _values_and_masks(row: RankedGroup) -> tuple[Sequence[list[float] | None], Sequence[list[bool] | None]]:
    none = [None] * len(row.completion_ids)
    return row.ref_token_logps or none, row.loss_masks or none


def _completion(
    key: str, token_ids: list[int], ref_logps: list[float] | None, mask: list[bool] | None
) -> TrainCompletion:
    return TrainCompletion(key, tuple(token_ids), _optional(ref_logps), _optional(mask))


def _with_ref_logps(completion: TrainCompletion, values: RefLogpsById | None) -> TrainCompletion:
    return replace(completion, ref_logps=_ref_logps(completion, values))


def _ref_logps(completion: TrainCompletion, values: RefLogpsById | None) -> TokenLogps | None:
    if values is None:
        return None
    return values[completion.completion_id] if completion.ref_logps is None else completion.ref_logps


def _optional(values: list[T] | None) -> tuple[T, ...] | None:
    return None if values is None else tuple(values)
