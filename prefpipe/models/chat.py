"""Messages to token ids and back: the only module that calls a tokenizer. Torch-free.

A chat template is applied once, when a prompt enters the pipeline; from then on token ids travel.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from prefpipe import clock
from prefpipe.config.base import suggestion
from prefpipe.errors import DataError, MissingInputError, RowFault, UsageError
from prefpipe.models import embedding, fingerprint, template
from prefpipe.schemas import Message

TODAY = "today"
_ROLES = ("system", "user", "assistant")
_MARK = "\ue0ff"  # a private character, in no template; a text that holds it is refused


@dataclass(frozen=True)
class Chat:
    """How a model reads a conversation.

    `named_tokens` are those that a template may print (`bos_token`, `eos_token`, ...). Any of `eos_token_ids` ends a
    completion. `control_tokens` are the texts that become a control token wherever they stand. `digests` identify
    tokenizer and template, and the date where the template prints one.
    """

    tokenizer: Tokenizer
    template: str
    named_tokens: dict[str, str]
    eos_token_ids: frozenset[int]
    control_tokens: tuple[str, ...]
    digests: dict[str, str]
    date: str = TODAY

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_all(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` for many at once."""
        return self.tokenizer.decode_batch([list(ids) for ids in token_ids], skip_special_tokens=True)


def load_chat(directory: Path, chat_template: str = "model", date: str = TODAY) -> Chat:
    """Read tokenizer, template and end-of-sequence ids of a model directory.

    `chat_template` is "model", "none" (plain text) or a file. `date` is the day (YYYY-MM-DD) that a template with a
    date prints; it is part of the digests of such a template only.

    Raises MissingInputError without tokenizer.json or template, DataError without an end-of-sequence token, or where
    the model has no embedding for a token that is written.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise MissingInputError(
            f"{directory} has no tokenizer.json",
            "make one with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = _json(directory / "tokenizer_config.json")
    named = {k: _token_text(v) for k, v in settings.items() if k.endswith("_token") and v is not None}
    eos = _eos_ids(directory, tokenizer, named)
    text = template.find(directory, settings, chat_template)
    embedding.check(directory, tokenizer, text, eos)
    if text == template.PLAIN:
        named |= {"opening_token": _opening(tokenizer), "closing_token": tokenizer.id_to_token(min(eos)) or ""}
    digests = {
        "tokenizer": fingerprint.tokenizer_digest(directory),
        "chat_template": fingerprint.text_digest(text),
    }
    if template.prints_date(text):
        date = clock.local_time("%Y-%m-%d") if date == TODAY else date
        digests["template_date"] = date
    # An ordinary added token is a control token when the template writes it.
    control = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special or t.content in text]
    return Chat(
        tokenizer=tokenizer,
        template=text,
        named_tokens=named,
        eos_token_ids=eos,
        control_tokens=tuple(control),
        digests=digests,
        date=date,
    )


def notices(chat: Chat) -> list[str]:
    """A line for each thing that the template puts into every prompt: a date, a default system message."""
    lines: list[str] = []
    if template.prints_date(chat.template):
        lines.append(f"the chat template prints a date, {chat.date}: --template-date fixes it for later runs")
    added = _default_system(chat)
    if added:
        lines.append(f"the chat template adds a system message of its own: {added!r}")
    return lines


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
    if control_tokens != "escape" or not any(_spelled(chat, m["content"]) for m in messages):
        return encode(chat, render(chat, messages, add_generation_prompt=add_generation_prompt))
    return _encode_escaped(chat, messages, add_generation_prompt=add_generation_prompt)


def check_control_tokens(chat: Chat, messages: Sequence[Message]) -> None:
    """Raise RowFault when a message spells a control token, which would be tokenised as one."""
    for message in messages:
        spelled = _spelled(chat, message["content"])
        if spelled is not None:
            raise RowFault("control_tokens", f"the {message['role']} message spells {spelled}")


def render(chat: Chat, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The chat template applied to messages. Raises RowFault when it refuses them."""
    return template.render(
        chat.template, chat.date, messages, chat.named_tokens, add_generation_prompt=add_generation_prompt
    )


def encode(chat: Chat, text: str) -> list[int]:
    """Token ids of rendered text. None is added: the template has written every control token already."""
    encodings = chat.tokenizer.encode_batch_fast([text], add_special_tokens=False)  # `encode` also computes offsets
    return encodings[0].ids


def _spelled(chat: Chat, text: str) -> str | None:
    return next((t for t in chat.control_tokens if t in text), None)


def _encode_escaped(chat: Chat, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    """Token ids in which a spelled control token is plain text.

    Before rendering, a mark and a number replace it, so that it survives the template. Afterwards it is tokenised in
    two halves, neither of which is the token. Raises RowFault when the ids do not decode to the text that was written:
    some tokenizers cannot join pieces without changing them.
    """
    if any(_MARK in m["content"] for m in messages):
        raise RowFault("control_tokens", "the text holds the private character that marks control tokens")
    tokens = sorted(chat.control_tokens, key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, tokens)))
    marked = [
        Message(
            role=m["role"], content=spelled.sub(lambda match: f"{_MARK}{tokens.index(match[0])}{_MARK}", m["content"])
        )
        for m in messages
    ]
    ids: list[int] = []
    plain: list[str] = []
    for place, piece in enumerate(render(chat, marked, add_generation_prompt=add_generation_prompt).split(_MARK)):
        text = tokens[int(piece)] if place % 2 else piece
        ids += encode(chat, text[:1]) + encode(chat, text[1:]) if place % 2 else encode(chat, text)
        plain.append(text)
    if chat.tokenizer.decode(ids, skip_special_tokens=False) != "".join(plain):
        raise RowFault("control_tokens", "this tokenizer cannot write a control token as plain text")
    return ids


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages or not any(m["content"].strip() for m in messages):
        raise RowFault("empty", "no message with text")
    roles = [m["role"] for m in messages]
    unknown = next((r for r in roles if r not in _ROLES), None)
    if unknown is not None:
        raise RowFault("bad_roles", f"unknown role {unknown!r}")
    if "system" in roles[1:] or roles[-1] != "user":
        raise RowFault("bad_roles", f"a prompt ends with a user message, system comes first; roles are {roles}")


def _default_system(chat: Chat) -> str:
    """The words in front of the first user turn that do not stand in front of the second one."""
    first, second = "\ue0a1", "\ue0a2"  # private characters as the texts of the two turns
    turns = [Message(role="user", content=first), Message(role="assistant", content=first)]
    try:
        opening, *_ = render(chat, turns[:1], add_generation_prompt=True).split(first)
        text = render(chat, [*turns, Message(role="user", content=second)], add_generation_prompt=True)
    except RowFault:
        return ""
    before_second = text.split(second)[0]
    pairs = zip(reversed(opening), reversed(before_second), strict=False)
    header = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    added = opening[: len(opening) - header]
    for token in chat.control_tokens:
        added = added.replace(token, " ")
    words = added.split()
    return " ".join(words) if len(words) > 1 else ""


def _opening(tokenizer: Tokenizer) -> str:
    """The token that the tokenizer puts in front of every text, or nothing."""
    ids = tokenizer.encode("", add_special_tokens=True).ids
    return tokenizer.id_to_token(ids[0]) or "" if ids else ""


def _eos_ids(directory: Path, tokenizer: Tokenizer, named: dict[str, str]) -> frozenset[int]:
    """Every id that ends a completion: of generation config, model config and tokenizer together."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _json(directory / name).get("eos_token_id")
        ids |= set(value if isinstance(value, list) else [] if value is None else [value])
    of_tokenizer = tokenizer.token_to_id(named.get("eos_token", ""))
    if of_tokenizer is not None:
        ids.add(of_tokenizer)
    if not ids:
        raise DataError(f"{directory} names no end-of-sequence token", "set eos_token_id in its generation_config.json")
    return frozenset(ids)


def _token_text(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else str(value["content"])


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
