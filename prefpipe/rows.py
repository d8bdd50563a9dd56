"""The parts of a row of any dataset: its key, its completions, its reference log-probs. No other module builds or
checks them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from prefpipe.errors import DataError, IdentityError
from prefpipe.ids import ids_digest
from prefpipe.schemas import Completion, Dropped, KlBank, Label, Pair, Prompt, RankedGroup, RefLogps

Logps = Mapping[str, RefLogps]  # by completion_id; of a row of the KL bank, by bank_id
PREFERENCES: dict[str, type] = {"pairs": Pair, "labels": Label, "kl_bank": KlBank, "groups": RankedGroup}
ROW_TYPES: dict[str, type] = {"prompts": Prompt, "completions": Completion, **PREFERENCES}


class CompletionIds(NamedTuple):
    """The token ids of a completion in a row. `key` is its completion_id; in the KL bank, where the prompt is another
    one's, the bank_id. `loss_mask` says which of its tokens are scored; None: all of them."""

    key: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    loss_mask: list[bool] | None
    digest: str


def key_column(row_type: type) -> str:
    """The column that identifies a row of a dataset: the first one."""
    return fields(row_type)[0].name


def key_of(row: Any) -> str:
    """The value that identifies a row in its dataset."""
    return getattr(row, key_column(type(row)))


def completions_of(row: Any) -> list[CompletionIds]:
    """The completions of a row, in the order of its columns; a prompt has none."""
    return _COMPLETIONS[type(row)](row)


def _of_pair(row: Pair) -> list[CompletionIds]:
    chosen = (row.chosen_token_ids, row.chosen_loss_mask, row.chosen_ids_digest)
    rejected = (row.rejected_token_ids, row.rejected_loss_mask, row.rejected_ids_digest)
    return [
        CompletionIds(row.chosen_completion_id, row.prompt_token_ids, *chosen),
        CompletionIds(row.rejected_completion_id, row.prompt_token_ids, *rejected),
    ]


def _of_one(row: Completion | Label | KlBank) -> list[CompletionIds]:
    return [CompletionIds(key_of(row), row.prompt_token_ids, row.token_ids, row.loss_mask, row.ids_digest)]


def _of_group(row: RankedGroup) -> list[CompletionIds]:
    masks = row.loss_masks or [None] * len(row.completion_ids)
    columns = zip(row.completion_ids, row.token_ids, masks, row.ids_digests, strict=True)
    return [CompletionIds(key, row.prompt_token_ids, ids, mask, digest) for key, ids, mask, digest in columns]


_COMPLETIONS: dict[type, Callable[[Any], list[CompletionIds]]] = {
    Pair: _of_pair,
    RankedGroup: _of_group,
    **dict.fromkeys((Completion, Label, KlBank), _of_one),
    Prompt: lambda _row: [],
}


def check_ids(row: Any, source: object) -> None:
    """Raise IdentityError when the token ids of a row have another digest than the row says, or their mask another
    length. `source` is where the row was read."""
    for key, prompt, ids, mask, digest in completions_of(row):
        if ids_digest(prompt, ids, mask) != digest or (mask is not None and len(mask) != len(ids)):
            raise ids_of_another_digest(key, source)


def ids_of_another_digest(key: str, source: object) -> IdentityError:
    """The error for token ids of a completion that have another digest than their row says."""
    return IdentityError(
        f"{source}: the token ids of {key} do not match their digest (ids_digest)",
        "the rows were edited or shuffled: make them again with the command that wrote them",
    )


def why_dropped(dropped: Sequence[Dropped]) -> str:
    """The reasons of ledger rows with their counts, and the first row: for the message when no row is left."""
    if not dropped:
        return "it has no rows"
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(row.reason for row in dropped).most_common())
    return f"{counts} (first: {dropped[0].id}: {dropped[0].detail})"


def what_helps(dropped: Sequence[Dropped]) -> str:
    """The settings that keep rows which were dropped for these reasons; empty where none does."""
    reasons = dict.fromkeys(row.reason for row in dropped)
    return "; ".join(_SETTINGS[reason] for reason in reasons if reason in _SETTINGS)


_SETTINGS = {
    "control_tokens": "--special-tokens-in-prompts escape or allow keeps rows whose text spells control tokens",
    "template_changes": "--template-changes allow keeps rows that the chat template changes, and --chat-template FILE "
    "takes another template",
    "several_turns": "--chat-template FILE takes a template whose {% generation %} marks say what is scored",
    "too_long": "--max-length and --max-prompt-length say how long a row may be",
    "missing": "--column NAME=COLUMN gives a column another name",
}


def logps_of_other_ids(completion_ids: Sequence[str], source: object) -> IdentityError:
    """The error for log-probs with another digest than the completions of the same ids have."""
    return IdentityError(
        f"{source}: the log-probs of {len(completion_ids)} completions were made for other token ids (first: "
        f"completion {completion_ids[0]}), or for others of them (loss_mask)",
        "score these completions again: prefpipe score --inputs DIR --out NEW",
    )


def one_reference(references: Iterable[str | None]) -> str | None:
    """The reference of all log-probs, None where there are none. Raises DataError for two: their values never mix."""
    names = sorted({name for name in references if name is not None})
    if len(names) > 1:
        raise DataError(
            f"the inputs hold log-probs of {len(names)} references: {', '.join(names)}",
            "pass inputs with one reference at a time",
        )
    return names[0] if names else None


def ref_logps(completion_id: str, digest: str, token_logps: list[float], *, reference: str, scorer: str) -> RefLogps:
    """A row of reference log-probs. `digest` is the ids_digest of the completion, `token_logps` (nats) has a value for
    each of its scored tokens."""
    return RefLogps(completion_id, reference, scorer, digest, token_logps, sum(token_logps), len(token_logps))


def with_ref_logps(row: Any, logps: Logps) -> Any:
    """A row with its reference columns filled from `logps`. A row without such columns comes back as it is, and so does
    every row when nothing was scored."""
    if not logps or isinstance(row, Prompt | Completion):
        return row
    scored = [logps[key] for key, *_ in completions_of(row)]
    sums, tokens = [r.ref_logps for r in scored], [r.token_logps for r in scored]
    names = {"reference": scored[0].reference, "scorer": scored[0].scorer}
    if isinstance(row, Pair):
        return replace(
            row,
            ref_chosen_logps=sums[0],
            ref_rejected_logps=sums[1],
            ref_chosen_token_logps=tokens[0],
            ref_rejected_token_logps=tokens[1],
            **names,
        )
    if isinstance(row, RankedGroup):
        return replace(row, ref_logps=sums, ref_token_logps=tokens, **names)
    return replace(row, ref_logps=sums[0], ref_token_logps=tokens[0], **names)
