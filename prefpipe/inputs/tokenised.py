"""Rows of foreign files as rows of ours, tokenised once: pairs, labels and completions to score and to train on."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from prefpipe import log
from prefpipe.errors import RowFault
from prefpipe.ids import common_prefix, content_id, ids_digest, masked_id
from prefpipe.inputs import answers, formats
from prefpipe.inputs.files import ForeignRow, rows
from prefpipe.inputs.formats import AnsweredPrompt
from prefpipe.models.chat import Chat
from prefpipe.models.encoding import (
    DROP,
    Rendered,
    Rules,
    check_characters,
    check_length,
    encode_rendered,
    prompt_text,
    rendered,
)
from prefpipe.models.thinking import Said
from prefpipe.schemas import Completion, Dropped, Label, Messages, Pair

T = TypeVar("T")
IMPORTED = "imported"
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Limits:
    """How long a row may be, and what happens to a longer one.

    max_prompt_length: tokens of a prompt; a row with a longer one is dropped
    max_length: tokens of prompt and completion together
    overlong: "drop" a row over max_length, or "keep_start": its completions lose their ends
    rules: what happens to a row whose text the tokenizer or the chat template would change
    """

    max_prompt_length: int = _NO_LIMIT
    max_length: int = _NO_LIMIT
    overlong: str = "drop"
    rules: Rules = DROP


@dataclass(frozen=True)
class Tokenised:
    """A prompt and its answers as token ids.

    prompt, prompt_id, prompt_ids: the prompt as messages, its content id, its token ids
    answers, token_ids: each answer as messages, and as token ids with the end-of-sequence token
    masks: for each answer which of its tokens are scored; None for all of them
    said: each answer parted into what stands before it and the last answer; one with further keys is what the token ids
        say
    cut: whether each answer lost its end to max_length
    answered: the row as it was parsed
    """

    prompt: Messages
    prompt_id: str
    prompt_ids: list[int]
    answers: list[Messages]
    token_ids: list[list[int]]
    masks: list[list[bool] | None]
    said: list[Said]
    cut: list[bool]
    answered: AnsweredPrompt

    def completion_id(self, i: int) -> str:
        """The completion_id of answer i: the same ids are the same completion, whatever file they come from."""
        return masked_id(self.prompt_ids, self.token_ids[i], "import", loss_mask=self.masks[i])

    def ids_digest(self, i: int) -> str:
        """The ids_digest of answer i."""
        return ids_digest(self.prompt_ids, self.token_ids[i], self.masks[i])

    def finish_reason(self, i: int) -> str:
        """The finish_reason of answer i: "length" when it lost its end to max_length."""
        return "length" if self.cut[i] else IMPORTED


def read_pairs(
    path: str | Path, chat: Chat, limits: Limits, columns: Mapping[str, str] | None, dropped: list[Dropped]
) -> Iterator[Pair]:
    """Pairs of a preference file (see formats), one at a time; its faulty rows go to `dropped`. `columns` renames some.
    Repeated pairs stay, and the log says how many.

    The prompt is the common token prefix of the prompt alone and both renderings; the rest is the completion, with its
    end-of-sequence token exactly once and nothing after it. Raises DataError for a file of another format.
    """
    hashes = array("q")  # 8 bytes a pair
    for _, pair in _read(rows(path, columns), "preference", chat, limits, to_pair, dropped):
        hashes.append(hash(pair.pair_id))
        yield pair
    repeats = len(hashes) - np.unique(np.asarray(hashes)).size
    if repeats:
        log.warn(f"{path}: {repeats} of {len(hashes)} pairs repeat an earlier one (`prefpipe score` drops these)")


def read_labels(
    path: str | Path, chat: Chat, limits: Limits, columns: Mapping[str, str] | None, dropped: list[Dropped]
) -> Iterator[Label]:
    """Labels of a file (see formats), tokenised as pairs are; its faulty and repeated rows go to `dropped`.

    Raises DataError for a file of another format.
    """
    labels: dict[str, bool] = {}
    for where, label in _read(rows(path, columns), "label", chat, limits, to_label, dropped):
        if label.completion_id in labels:
            conflicting = labels[label.completion_id] != label.label
            dropped.append(repeated(label.completion_id, where, conflicting=conflicting))
        else:
            labels[label.completion_id] = label.label
            yield label


def read_completions(
    path: str | Path, chat: Chat, limits: Limits, columns: Mapping[str, str] | None, dropped: list[Dropped]
) -> Iterator[Completion]:
    """Answers of a file of prompts and completions, or of conversations that end with the assistant (see formats),
    tokenised as pairs are; its faulty rows go to `dropped`. Repeated rows stay.

    Raises DataError for a file of another format.
    """
    return (row for _, row in _read(rows(path, columns), "completion", chat, limits, to_completion, dropped))


def repeated(completion_id: str, where: str, *, conflicting: bool) -> Dropped:
    """The ledger row of an answer that an earlier row has; `conflicting`: with the other label."""
    if conflicting:
        return Dropped(completion_id, "conflicting_label", f"{where} has another label than an earlier row; that stays")
    return Dropped(completion_id, "duplicate", f"{where} repeats an earlier row")


def _read(
    source: Iterable[ForeignRow],
    kind: str,
    chat: Chat,
    limits: Limits,
    convert: Callable[[Tokenised], T],
    dropped: list[Dropped],
) -> Iterator[tuple[str, T]]:
    """Rows of a file of format `kind` and their places; faulty ones go to `dropped`. Raises DataError for another
    format."""
    for number, (where, row) in enumerate(source):
        found = formats.recognise(row, where) if number == 0 else kind
        if found != kind:
            raise formats.other_kind(found, kind, where)
        try:
            yield where, convert(tokenise(formats.parse(row, kind), chat, limits))
        except RowFault as fault:
            dropped.append(Dropped(where, fault.reason, fault.detail))


def tokenise(answered: AnsweredPrompt, chat: Chat, limits: Limits) -> Tokenised:
    """Prompt ids (the common token prefix of the prompt alone and every rendering) and answer ids (the rest, up to the
    end of the answer). Raises RowFault for a row that cannot be used."""
    prompt, inputs, rules, turns = answered.prompt, answered.template_inputs, limits.rules, answered.answers
    for of_answer in turns:
        answers.check_marks(chat, of_answer)
    opening = prompt_text(chat, prompt, inputs, rules)
    check_characters(chat, opening, limits.max_prompt_length)
    alone = encode_rendered(chat, opening)
    check_length(alone, limits.max_prompt_length)
    texts = [rendered(chat, [*prompt, *t], inputs, rules, add_generation_prompt=False) for t in turns]
    if rules.template_changes == "drop":
        for text in texts:
            _check_opening(opening, text)
    if limits.overlong == "drop":
        for text in texts:
            check_characters(chat, text, limits.max_length)
    whole = [answers.encode(chat, text, t) for text, t in zip(texts, turns, strict=True)]
    shared = common_prefix([alone, *(w.ids for w in whole)])
    found = [answers.behind_prompt(chat, w, shared, t) for w, t in zip(whole, turns, strict=True)]
    room = limits.max_length - shared
    cut = [len(answer.ids) > room for answer in found]
    if any(cut):
        longest = shared + max(len(answer.ids) for answer in found)
        if limits.overlong == "drop" or room < 1:
            raise RowFault("too_long", f"{longest} tokens in prompt and completion, max_length is {limits.max_length}")
        found = [answer.start(room) for answer in found]
    read = [answers.read(chat, a, t, cut=c) for a, t, c in zip(found, turns, cut, strict=True)]
    return Tokenised(
        prompt=prompt,
        prompt_id=prompt_key(prompt, answered.answer, inputs),
        prompt_ids=alone[:shared],
        answers=[said_turns for _, said_turns in read],
        token_ids=[answer.ids for answer in found],
        masks=[answer.mask for answer in found],
        said=[said for said, _ in read],
        cut=cut,
        answered=answered,
    )


def prompt_key(messages: Messages, answer: str | None, template_inputs: str | None) -> str:
    """The prompt_id of a prompt."""
    return content_id(messages, answer, *([template_inputs] if template_inputs else []))


def to_completion(source: Tokenised, i: int = 0) -> Completion:
    """Answer i of a row of any format."""
    return Completion(
        completion_id=source.completion_id(i),
        prompt_id=source.prompt_id,
        sample_index=i,
        text=source.said[i].text,
        prompt_token_ids=source.prompt_ids,
        token_ids=source.token_ids[i],
        finish_reason=source.finish_reason(i),
        policy=source.answered.writers[i] or IMPORTED,
        ids_digest=source.ids_digest(i),
        messages=source.answers[i] if len(source.answers[i]) > 1 or "extra" in source.answers[i][0] else None,
        thinking=source.said[i].thinking,
        thinking_tokens=source.said[i].thinking_tokens,
        loss_mask=source.masks[i],
    )


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
        ids_digest=source.ids_digest(0),
        finish_reason=source.finish_reason(0),
        reward=None,
        weight=1.0,
        ref_logps=None,
        ref_token_logps=None,
        reference=None,
        scorer=None,
        template_inputs=source.answered.template_inputs,
        loss_mask=source.masks[0],
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
        chosen_ids_digest=source.ids_digest(0),
        rejected_ids_digest=source.ids_digest(1),
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
        template_inputs=source.answered.template_inputs,
        chosen_loss_mask=source.masks[0],
        rejected_loss_mask=source.masks[1],
    )


def _check_opening(opening: Rendered, whole: Rendered) -> None:
    """Raise RowFault when a prompt reads otherwise alone than in front of its answer: what is sampled would answer
    another prompt than what is trained on."""
    alone, text = opening.plain, whole.plain
    if text.startswith(alone):
        return
    shared = common_prefix([alone, text])
    raise RowFault(
        "template_changes",
        f"the prompt alone goes on with {alone[shared : shared + 40]!r} where the answer's rendering has "
        f"{text[shared : shared + 40]!r}",
    )
