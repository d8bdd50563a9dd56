"""What a row of any dataset is made of: its key, its completions, its reference columns."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from prefpipe.schemas import Completion, KlBank, Label, Pair, Prompt, RankedGroup, RefLogps

Logps = Mapping[str, RefLogps]
PREFERENCES: dict[str, type] = {"pairs": Pair, "labels": Label, "kl_bank": KlBank, "groups": RankedGroup}
ROW_TYPES: dict[str, type] = {"prompts": Prompt, "completions": Completion, **PREFERENCES}


def key_column(row_type: type) -> str:
    """The column that identifies a row of a dataset: the first one."""
    return fields(row_type)[0].name


def key_of(row: Any) -> str:
    """What identifies a row in its dataset."""
    return getattr(row, key_column(type(row)))


_Parts = tuple[str, list[int], list[int], str]  # id, prompt ids, completion ids, digest


def _of_pair(row: Pair) -> list[_Parts]:
    prompt = row.prompt_token_ids
    return [
        (row.chosen_completion_id, prompt, row.chosen_token_ids, row.chosen_ids_digest),
        (row.rejected_completion_id, prompt, row.rejected_token_ids, row.rejected_ids_digest),
    ]


def _of_one(row: Completion | Label | KlBank) -> list[_Parts]:
    return [(key_of(row), row.prompt_token_ids, row.token_ids, row.ids_digest)]


def _of_group(row: RankedGroup) -> list[_Parts]:
    columns = zip(row.completion_ids, row.token_ids, row.ids_digests, strict=True)
    return [(name, row.prompt_token_ids, ids, digest) for name, ids, digest in columns]


_PARTS: dict[type, Callable[[Any], list[_Parts]]] = {
    Pair: _of_pair,
    RankedGroup: _of_group,
    **dict.fromkeys((Completion, Label, KlBank), _of_one),
    Prompt: lambda _row: [],
}


def parts_of(row: Any) -> list[_Parts]:
    """(id, prompt ids, token ids, digest) of every completion of a row, in its order; none of a prompt."""
    return _PARTS[type(row)](row)


def filled(row: Any, logps: Logps) -> Any:
    """A row with its reference values, where it has such columns and they were scored."""
    if not logps or isinstance(row, Prompt | Completion):
        return row
    if isinstance(row, Pair):
        chosen, rejected = logps[row.chosen_completion_id], logps[row.rejected_completion_id]
        return replace(
            row,
            ref_chosen_logps=chosen.ref_logps,
            ref_rejected_logps=rejected.ref_logps,
            ref_chosen_token_logps=chosen.token_logps,
            ref_rejected_token_logps=rejected.token_logps,
            reference=chosen.reference,
            scorer=chosen.scorer,
        )
    if isinstance(row, RankedGroup):
        own = [logps[name] for name in row.completion_ids]
        values: tuple[Any, Any] = [r.ref_logps for r in own], [r.token_logps for r in own]
        found = own[0]
    else:
        found = logps[row.bank_id if isinstance(row, KlBank) else row.completion_id]
        values = found.ref_logps, found.token_logps
    return replace(row, ref_logps=values[0], ref_token_logps=values[1], reference=found.reference, scorer=found.scorer)
