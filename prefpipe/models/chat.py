"""Messages to token ids and back: the only module that calls a tokenizer.

A chat template is applied once, when a prompt enters the pipeline; from then on token ids travel. The tokenizer and its
template are those of transformers, which is imported when a model is loaded, not with this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from prefpipe import clock, log
from prefpipe.config.base import suggestion
from prefpipe.errors import DataError, RowFault, UsageError
from prefpipe.models import dialogue, embedding, escape, fingerprint, template
from prefpipe.models.tokenizer import load_tokenizer
from prefpipe.schemas import Message

TODAY = "today"
_ROLES = ("system", "user", "assistant")


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
    """

    tokenizer: Tokenizer
    template: str
    named_tokens: dict[str, str]
    eos_token_ids: frozenset[int]
    control_tokens: tuple[str, ...]
    answer_control_tokens: frozenset[str]
    digests: dict[str, str]
    date: str = TODAY

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_all(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` for many at once."""
        return self.tokenizer.decode_batch([list(ids) for ids in token_ids], skip_special_tokens=True)


def load_chat(directory: Path, chat_template: str = "model", date: str = TODAY, *, generates: bool = True) -> Chat:
    """Tokenizer, template and end-of-sequence ids of a model directory, as transformers loads them.

    `chat_template` is "model", "none" (plain text), a file, or the name of one of several templates of the model.
    `date` is the day (YYYY-MM-DD) that a template with a date prints; it is part of the digests of such a template
    only. A model that generates nothing, such as a classifier, needs no end-of-sequence token.

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
    added = loaded.backend.get_added_tokens_decoder().values()
    control, in_answers = dialogue.control_tokens(added, text, partial(template.render, text, date, tokens=named))
    return Chat(
        tokenizer=loaded.backend,
        template=text,
        named_tokens=named,
        eos_token_ids=loaded.eos_token_ids,
        control_tokens=control,
        answer_control_tokens=in_answers,
        digests=digests,
        date=date,
    )


def notices(chat: Chat) -> list[str]:
    """A line for each thing that the template puts into every prompt: a date, a default system message."""
    lines: list[str] = []
    if template.prints_date(chat.template):
        lines.append(f"the chat template prints a date, {chat.date}: --template-date fixes it for later runs")
    added = dialogue.default_system(partial(render, chat), chat.control_tokens)
    if added:
        lines.append(f"the chat template adds a system message of its own: {added!r}")
    return lines


def check_ends(chat: Chat) -> None:
    """Log a warning when the template does not end an answer in a token that ends a completion, and what to set."""
    tail = dialogue.after_answer(partial(render, chat))
    if tail is None or chat.eos_token_ids & set(encode(chat, tail)):
        return
    known = ", ".join(repr(chat.tokenizer.id_to_token(i) or f"id {i}") for i in sorted(chat.eos_token_ids))
    written = [token for token in chat.control_tokens if token in tail]
    if written:
        token = min(written, key=tail.find)
        log.warn(
            f"the chat template ends an answer with {token!r}, which is no end-of-sequence token of the model (it has "
            f"{known}): completions go on behind it; add {chat.tokenizer.token_to_id(token)} to eos_token_id in "
            f"generation_config.json, or sample with --stop '{token}'"
        )
        return
    later = dialogue.after_answer(partial(render, chat), more=True) or ""
    ends = [token for token in chat.control_tokens if token in later]
    only = f" unless another turn follows ({min(ends, key=later.find)!r})" if ends else ""
    log.warn(
        f"the chat template writes no end-of-sequence token behind an answer{only}; the model has {known}: it does "
        "not learn to stop from such rows; pass a --chat-template that ends every answer with one"
    )


def stop_ids(chat: Chat, strings: Sequence[str]) -> list[int]:
    """The ids of stop strings that are control tokens of the tokenizer.

    Raises UsageError for any other text. It can end inside a token: the text would be cut there, and the token ids with
    their log-probs would go on.
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


def encode_prompt(chat: Chat, messages: Sequence[Message], *, max_tokens: int, control_tokens: str) -> list[int]:
    """Token ids of a prompt, up to where the answer begins. Raises RowFault for a prompt that cannot be used.

    `control_tokens` as in `encode_messages`.
    """
    _check_messages(messages)
    ids = encode_messages(chat, messages, add_generation_prompt=True, control_tokens=control_tokens)
    if len(ids) > max_tokens:
        raise RowFault("too_long", f"{len(ids)} tokens in the prompt, the most is {max_tokens}")
    return ids


def encode_messages(
    chat: Chat, messages: Sequence[Message], *, add_generation_prompt: bool, control_tokens: str
) -> list[int]:
    """Token ids of a rendered conversation.

    `control_tokens` says what to do with a message that spells one: "drop" raises RowFault, "escape" tokenises it as
    the plain text that it is, "allow" lets it become the control token.
    """
    if control_tokens == "drop":
        check_control_tokens(chat, messages)
    spelled = [_spelled(chat, m) for m in messages] if control_tokens == "escape" else []
    if not any(spelled):
        return encode(chat, render(chat, messages, add_generation_prompt=add_generation_prompt))
    marked, tokens = escape.mark(messages, spelled)
    text = render(chat, marked, add_generation_prompt=add_generation_prompt)
    return escape.encode_marked(chat.tokenizer, text, tokens)


def check_control_tokens(chat: Chat, messages: Sequence[Message]) -> None:
    """Raise RowFault when a message spells a control token, which would be tokenised as one."""
    for message in messages:
        spelled = _spelled(chat, message)
        if spelled:
            raise RowFault("control_tokens", f"the {message['role']} message spells {spelled[0]}")


def render(chat: Chat, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The chat template applied to messages. Raises RowFault when it refuses them."""
    return template.render(
        chat.template, chat.date, messages, chat.named_tokens, add_generation_prompt=add_generation_prompt
    )


def encode(chat: Chat, text: str) -> list[int]:
    """Token ids of rendered text. None is added: the template has written every control token already."""
    encodings = chat.tokenizer.encode_batch_fast([text], add_special_tokens=False)  # `encode` also computes offsets
    return encodings[0].ids


def _spelled(chat: Chat, message: Message) -> list[str]:
    """The control tokens that a message spells. An answer may hold tokens that open turns of the user: they are words
    of the model there."""
    tokens = chat.control_tokens
    if message["role"] == "assistant":
        tokens = [token for token in tokens if token in chat.answer_control_tokens]
    return [token for token in tokens if token in message["content"]]


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages or not any(m["content"].strip() for m in messages):
        raise RowFault("empty", "no message with text")
    roles = [m["role"] for m in messages]
    unknown = next((r for r in roles if r not in _ROLES), None)
    if unknown is not None:
        raise RowFault("bad_roles", f"unknown role {unknown!r}")
    if "system" in roles[1:] or roles[-1] != "user":
        raise RowFault("bad_roles", f"a prompt ends with a user message, system comes first; roles are {roles}")
