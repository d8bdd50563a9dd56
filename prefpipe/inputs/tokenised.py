"""Rows of foreign files as rows of ours, tokenised once: pairs and labels to score and to train on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefpipe.errors import DataError, RowFault
from prefpipe.ids import common_prefix, content_id, ids_digest
from prefpipe.inputs import formats
from prefpipe.inputs.files import rows
from prefpipe.inputs.formats import AnsweredPrompt
from prefpipe.models.chat import Chat, encode_messages, encode_prompt
from prefpipe.schemas import Dropped, Label, Message, Messages, Pair

IMPORTED = "imported"
_NO_LIMIT = 1 << 30
_JSON = json.JSONEncoder(ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Limits:
    """How long a row may be, and what happens to a longer one.

    max_prompt_length: tokens of a prompt; a row with a longer one is dropped
    max_length: tokens of prompt and completion together
    overlong: "drop" a row over max_length, or "keep_start": its completions lose their ends
    control_tokens: text that spells a control token: "drop" the row, "escape" (tokenise it as plain text) or "allow"
    """

    max_prompt_length: int = _NO_LIMIT
    max_length: int = _NO_LIMIT
    overlong: str = "drop"
    control_tokens: str = "drop"


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Tokenised:
    """A prompt and its answers as token ids.

    prompt, prompt_id, prompt_ids: the prompt as messages, its content id, its token ids
    answers, token_ids: each answer as messages, and as token ids with the end-of-sequence token
    cut: whether each answer lost its end to max_length
    answered: the row as it was parsed
    """

    prompt: Messages
    prompt_id: str
    prompt_ids: list[int]
    answers: list[Messages]
    token_ids: list[list[int]]
    cut: list[bool]
    answered: AnsweredPrompt

    def completion_id(self, i: int) -> str:
        """The completion_id of answer i: the same ids are the same completion, whatever file they come from."""
        return content_id(self.prompt_ids, self.token_ids[i], "import")

    def finish_reason(self, i: int) -> str:
        """The finish_reason of answer i: "length" when it lost its end to max_length."""
        return "length" if self.cut[i] else IMPORTED


def read_pairs(path: Path, chat: Chat, limits: Limits = NO_LIMITS) -> tuple[list[Pair], list[Dropped]]:
    """Pairs of a preference file (see formats), and the ledger of its faulty rows.

    The prompt is the common token prefix of the prompt alone and both renderings; the rest is the completion, with its
    end-of-sequence token exactly once and nothing after it. Raises DataError for a file without a usable pair.
    """
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    for where, row in rows(path):
        try:
            pairs.append(to_pair(tokenise(formats.parse(row, "preference", where), chat, limits)))
        except RowFault as fault:
            dropped.append(Dropped(where, fault.reason, fault.detail))
    if not pairs:
        raise DataError(
            f"{path} has no usable pair ({len(dropped)} rows dropped)", "see the reasons in dropped.parquet"
        )
    return pairs, dropped


def read_labels(path: Path, chat: Chat, limits: Limits = NO_LIMITS) -> tuple[list[Label], list[Dropped]]:
    """Labels of a TRL unpaired file (`prompt`, `completion`, `label`; text or messages), tokenised as pairs are, and
    the ledger of its faulty and repeated rows.

    Raises DataError for a label that is not true or false, and for a file without a usable label.
    """
    labels: dict[str, Label] = {}
    dropped: list[Dropped] = []
    for where, row in rows(path):
        try:
            label = to_label(tokenise(formats.parse(row, "label", where), chat, limits))
        except RowFault as fault:
            dropped.append(Dropped(where, fault.reason, fault.detail))
            continue
        if label.completion_id in labels:
            dropped.append(Dropped(label.completion_id, "duplicate", f"{where} repeats an earlier row"))
        labels.setdefault(label.completion_id, label)
    if not labels:
        raise DataError(
            f"{path} has no usable label ({len(dropped)} rows dropped)", "see the reasons in dropped.parquet"
        )
    return list(labels.values()), dropped


def tokenise(answered: AnsweredPrompt, chat: Chat, limits: Limits) -> Tokenised:
    """Prompt ids (the common token prefix of the prompt alone and every rendering) and answer ids (the rest, up to the
    end of the answer). Raises RowFault for a row that cannot be used."""
    prompt = answered.prompt
    alone = encode_prompt(chat, prompt, max_tokens=limits.max_prompt_length, control_tokens=limits.control_tokens)
    whole = [
        encode_messages(chat, [*prompt, *turns], add_generation_prompt=False, control_tokens=limits.control_tokens)
        for turns in answered.answers
    ]
    shared = common_prefix([alone, *whole])
    ids = [_until_eos(w[shared:], chat) for w in whole]
    room = limits.max_length - shared
    cut = [len(i) > room for i in ids]
    if any(cut):
        longest = shared + max(map(len, ids))
        if limits.overlong == "drop" or room < 1:
            raise RowFault("too_long", f"{longest} tokens in prompt and completion, max_length is {limits.max_length}")
        ids = [i[:room] for i in ids]
    answers = [
        [Message(role="assistant", content=chat.decode(i))] if was_cut else turns
        for i, turns, was_cut in zip(ids, answered.answers, cut, strict=True)
    ]
    return Tokenised(prompt, content_id(prompt, answered.answer), alone[:shared], answers, ids, cut, answered)


def to_label(source: Tokenised) -> Label:
    """A row of the label format."""
    assert source.answered.label is not None
    return Label(
        completion_id=source.completion_id(0),
        prompt_id=source.prompt_id,
        prompt=source.prompt,
        completion=source.answers[0],
        label=source.answered.label,
        prompt_token_ids=source.prompt_ids,
        token_ids=source.token_ids[0],
        ids_digest=ids_digest(source.prompt_ids, source.token_ids[0]),
        finish_reason=source.finish_reason(0),
        reward=None,
        weight=1.0,
        ref_logps=None,
        ref_token_logps=None,
        reference=None,
        scorer=None,
    )


def to_pair(source: Tokenised) -> Pair:
    """A row of the preference format. Raises RowFault when both answers have the same tokens."""
    if source.token_ids[0] == source.token_ids[1]:
        raise RowFault("identical", "chosen and rejected have the same tokens")
    ids = [source.completion_id(i) for i in (0, 1)]
    ratings = source.answered.ratings or [None, None]
    gap = ratings[0] - ratings[1] if ratings[0] is not None and ratings[1] is not None else None
    return Pair(
        pair_id=content_id(*ids),
        prompt_id=source.prompt_id,
        chosen_completion_id=ids[0],
        rejected_completion_id=ids[1],
        prompt=source.prompt,
        chosen=source.answers[0],
        rejected=source.answers[1],
        prompt_token_ids=source.prompt_ids,
        chosen_token_ids=source.token_ids[0],
        rejected_token_ids=source.token_ids[1],
        chosen_ids_digest=ids_digest(source.prompt_ids, source.token_ids[0]),
        rejected_ids_digest=ids_digest(source.prompt_ids, source.token_ids[1]),
        chosen_reward=ratings[0],
        rejected_reward=ratings[1],
        reward_gap=gap,
        preference_prob=None,
        chosen_finish_reason=source.finish_reason(0),
        rejected_finish_reason=source.finish_reason(1),
        weight=1.0,
        ref_chosen_logps=None,
        ref_rejected_logps=None,
        ref_chosen_token_logps=None,
        ref_rejected_token_logps=None,
        reference=None,
        scorer=None,
    )


def to_json(values: Mapping[str, Any]) -> str:
    """Columns that no field of a row type holds, as JSON."""
    return _JSON.encode(values)


def _until_eos(ids: list[int], chat: Chat) -> list[int]:
    """The ids of a completion up to the end-of-sequence token of its last turn. What the template adds behind it is no
    part of the completion."""
    last = max((i for i, t in enumerate(ids) if t in chat.eos_token_ids), default=None)
    while last and ids[last - 1] in chat.eos_token_ids:
        last -= 1
    ids = ids if last is None else ids[: last + 1]
    if not ids:
        raise RowFault("empty", "a completion without tokens")
    return ids
