"""The tokenizer and chat template of a model, as transformers loads them, and the way from token ids back to text.

transformers is imported when a model is loaded, not with this module.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from prefpipe import clock
from prefpipe.config.base import suggestion
from prefpipe.errors import DataError, UsageError
from prefpipe.models import dialogue, embedding, fingerprint, template, thinking, turns
from prefpipe.models.thinking import Marks, Said
from prefpipe.models.tokenizer import load_tokenizer
from prefpipe.models.turns import Shape
from prefpipe.schemas import Message

TODAY = "today"


@dataclass(frozen=True)
class Chat:
    """How a model reads a conversation.

    tokenizer: encodes and decodes, without padding and truncation
    template: the text of the chat template
    named_tokens: those that a template may print (`bos_token`, `eos_token`, ...)
    eos_token_ids: any of these ids ends a completion
    control_tokens: texts that become a control token in a message of system or user
    answer_control_tokens: those of the control_tokens that are no content of an answer either
    digests: identity of tokenizer and template, and the date where the template prints one
    date: the day that the template prints (YYYY-MM-DD)
    shape: the form in which the template reads messages
    template_kwargs: what the template gets for every conversation; a row may change it
    thinking: the marks around the reasoning of an answer; None for a model without
    """

    tokenizer: Tokenizer
    template: str
    named_tokens: dict[str, str]
    eos_token_ids: frozenset[int]
    control_tokens: tuple[str, ...]
    answer_control_tokens: frozenset[str]
    digests: dict[str, str]
    date: str = TODAY
    shape: Shape = field(default_factory=Shape)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    thinking: Marks | None = None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without control tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of n times as many characters has more than n tokens."""
        return max(map(len, self.tokenizer.get_vocab()))

    def said(self, token_ids: Sequence[int], text: str) -> Said:
        """A completion split into reasoning and answer. `text` is its decoded text, or the text in a file."""
        return thinking.split(token_ids, text, self.thinking, self.decode)

    def decode_all(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """The texts of many lists of token ids; see `decode`."""
        return self.tokenizer.decode_batch([list(ids) for ids in token_ids], skip_special_tokens=True)


def load_chat(
    directory: Path,
    chat_template: str = "model",
    date: str = TODAY,
    *,
    template_kwargs: str = "{}",
    thinking_marks: str = "model",
    generates: bool = True,
) -> Chat:
    """Tokenizer, template and end-of-sequence ids of a model directory, as transformers loads them.

    `chat_template` is "model", "none" (plain text), a file, or the name of one of several templates of the model.
    `date` is the day (YYYY-MM-DD) that a template with a date prints; it is part of the digests of such a template
    only. `template_kwargs` is JSON of what the template gets beside messages (`{"enable_thinking": false}`). A model
    that generates nothing, such as a classifier, needs no end-of-sequence token. `thinking_marks` as in
    `thinking.pair_of`.

    Raises MissingInputError without tokenizer or template, DataError without an end-of-sequence token, or where the
    model has no embedding for a token that is written, and what `load_tokenizer` raises.
    """
    loaded = load_tokenizer(directory)
    if generates and not loaded.eos_token_ids:
        raise DataError(f"{directory} names no end-of-sequence token", "set eos_token_id in its generation_config.json")
    text = template.find(directory, loaded.chat_template, chat_template)
    embedding.check(directory, loaded.backend, text, loaded.eos_token_ids)
    named = loaded.named_tokens
    if text == template.PLAIN:
        closing = named.get("eos_token") or loaded.closing
        if not closing and loaded.eos_token_ids:
            closing = loaded.backend.id_to_token(min(loaded.eos_token_ids)) or ""
        named = named | {"opening_token": loaded.opening, "closing_token": closing}
    digests = {"tokenizer": loaded.digest, "chat_template": fingerprint.text_digest(text)}
    if template.prints_date(text):
        date = clock.local_time("%Y-%m-%d") if date == TODAY else date
        digests["template_date"] = date
    kwargs = json.loads(template_kwargs)
    if kwargs:
        digests["chat_template_kwargs"] = fingerprint.text_digest(template_kwargs)
    added = loaded.backend.get_added_tokens_decoder().values()
    probe = partial(template.render, text, date, tokens=named, inputs={"chat_template_kwargs": kwargs})
    try:
        shape = turns.shape_of(text, partial(probe, add_generation_prompt=False))
    except DataError as error:
        source = chat_template if Path(chat_template).is_file() else directory
        raise DataError(f"{source}: {error.message}", error.hint) from error

    def small(messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return probe(turns.for_template(messages, shape), add_generation_prompt=add_generation_prompt)

    control, in_answers = dialogue.control_tokens(added, text, small)
    return Chat(
        tokenizer=loaded.backend,
        template=text,
        named_tokens=named,
        eos_token_ids=loaded.eos_token_ids,
        control_tokens=control,
        answer_control_tokens=in_answers,
        digests=digests,
        date=date,
        shape=shape,
        template_kwargs=kwargs,
        thinking=_marks(loaded.backend, thinking_marks, text),
    )


def _marks(tokenizer: Tokenizer, setting: str, template_text: str) -> Marks | None:
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    pair = thinking.pair_of(setting, added, template_text)
    return Marks(*pair, tuple(tokenizer.encode(pair[1], add_special_tokens=False).ids)) if pair else None


def stop_ids(chat: Chat, strings: Sequence[str]) -> list[int]:
    """The ids of stop texts that are control tokens of the tokenizer.

    Raises UsageError for any other text: it can end inside a token, where the text would be cut, while the token ids
    and their log-probs would go on.
    """
    known = {token.content: number for number, token in chat.tokenizer.get_added_tokens_decoder().items()}
    for text in strings:
        if text not in known:
            raise UsageError(
                f"stop string {text!r} is not a control token of this tokenizer{suggestion(text, list(known))}: it can "
                "end inside a token, and then the text stops where the token ids, and their log-probs, go on",
                "stop at a control token or by --stop-token-ids, or use a reward that rates long answers lower",
            )
    return [known[text] for text in strings]
