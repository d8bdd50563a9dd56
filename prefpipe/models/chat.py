"""The only caller of chat templates and tokenizers: messages to token ids and back. Torch-free.

A chat template is applied once, when a prompt enters the pipeline; from then on token ids travel.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from prefpipe import clock
from prefpipe.config.base import suggestion
from prefpipe.errors import DataError, MissingInputError, RowFault, UsageError
from prefpipe.models import fingerprint
from prefpipe.schemas import Message

TODAY = "today"
_ROLES = ("system", "user", "assistant")
_MARK = "\ue0ff"  # private use: in no template and, one hopes, in no text; a text that has it is refused
# Plain-text mode: a prompt, its answer, the end; the tokenizer's own opening token where it adds one.
_PLAIN = (
    "{% if messages | length > 2 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('plain-text mode takes one prompt and one answer') }}{% endif %}"
    "{{ opening_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ closing_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Chat:
    """A tokenizer, a chat template and what ends a completion."""

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

    Raises MissingInputError without tokenizer.json or template, DataError without an end-of-sequence token.
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
    template = _template(directory, settings, chat_template)
    if template == _PLAIN:
        named |= {"opening_token": _opening(tokenizer), "closing_token": tokenizer.id_to_token(min(eos)) or ""}
    digests = {
        "tokenizer": fingerprint.tokenizer_digest(directory),
        "chat_template": fingerprint.text_digest(template),
    }
    if _prints_date(template):
        date = clock.local_time("%Y-%m-%d") if date == TODAY else date
        digests["template_date"] = date
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special or t.content in template]
    return Chat(
        tokenizer=tokenizer,
        template=template,
        named_tokens=named,
        eos_token_ids=eos,
        control_tokens=tuple(special),
        digests=digests,
        date=date,
    )


def notices(chat: Chat) -> list[str]:
    """What a template puts into every prompt by itself: a default system message, a date."""
    found: list[str] = []
    if _prints_date(chat.template):
        found.append(f"the chat template prints a date, {chat.date}: --template-date fixes it for later runs")
    added = _default_system(chat)
    if added:
        found.append(f"the chat template adds a system message of its own: {added!r}")
    return found


def stop_ids(chat: Chat, strings: Sequence[str]) -> list[int]:
    """The ids of stop strings that are control tokens of the tokenizer. Raises UsageError for any other text: it can
    end inside a token, and then a text that is cut there and its token ids disagree."""
    known = {token.content: number for number, token in chat.tokenizer.get_added_tokens_decoder().items()}
    for text in strings:
        if text not in known:
            raise UsageError(
                f"stop string {text!r} is not a token of its own in this tokenizer{suggestion(text, list(known))}: it "
                "can end inside a token, and then the text stops where the token ids, and their log-probs, go on",
                "stop at a control token, by --stop-token-ids, or leave it out and drop what runs on by a reward",
            )
    return [known[text] for text in strings]


def encode_prompt(chat: Chat, messages: Sequence[Message], *, max_tokens: int, control_tokens: str) -> list[int]:
    """Token ids of a prompt, ready for the answer. Raises RowFault for a prompt that cannot be used.

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
    """The chat template applied to messages, as transformers' apply_chat_template does it.

    Raises RowFault when the template refuses the messages.
    """
    try:
        return _compiled(chat.template, chat.date).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **chat.named_tokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: {error}", "fix it, or pass --chat-template FILE"
        ) from error
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise RowFault("template_refused", str(error)) from error


def encode(chat: Chat, text: str) -> list[int]:
    """Token ids of rendered text; the template already holds every control token, so none is added."""
    (found,) = chat.tokenizer.encode_batch_fast([text], add_special_tokens=False)  # `encode` also finds the offsets
    return found.ids


def _spelled(chat: Chat, text: str) -> str | None:
    return next((t for t in chat.control_tokens if t in text), None)


def _encode_escaped(chat: Chat, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    """Each spelled control token is marked, so that it survives the template, and then tokenised in two halves, neither
    of which is the token. Raises RowFault where a tokenizer cannot join pieces without changing the text."""
    if any(_MARK in m["content"] for m in messages):
        raise RowFault("control_tokens", "the text holds the private character that marks control tokens")
    tokens = sorted(chat.control_tokens, key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, tokens)))
    marked = [
        Message(
            role=m["role"], content=spelled.sub(lambda found: f"{_MARK}{tokens.index(found[0])}{_MARK}", m["content"])
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


def _prints_date(template: str) -> bool:
    return "strftime_now" in template


def _default_system(chat: Chat) -> str:
    """The words in front of the first user turn that do not stand in front of the second one."""
    first, second = "\ue0a1", "\ue0a2"
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
    """The token that the tokenizer itself puts in front of a text, if it does."""
    ids = tokenizer.encode("", add_special_tokens=True).ids
    return tokenizer.id_to_token(ids[0]) or "" if ids else ""


def _template(directory: Path, settings: dict[str, Any], chosen: str) -> str:
    if chosen == "none":
        return _PLAIN
    if chosen != "model":
        path = Path(chosen)
        if not path.is_file():
            raise MissingInputError(f"chat template {chosen} does not exist", "give the path of a Jinja file")
        return path.read_text(encoding="utf-8")
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    inside = settings.get("chat_template")
    if isinstance(inside, list):
        inside = next((t["template"] for t in inside if t["name"] == "default"), None)
    if not isinstance(inside, str):
        raise MissingInputError(
            f"{directory} has no chat template",
            "pass one with --chat-template FILE.jinja, or --chat-template none for plain text",
        )
    return inside


def _eos_ids(directory: Path, tokenizer: Tokenizer, named: dict[str, str]) -> frozenset[int]:
    """Every id that ends a completion: generation config, model config and the tokenizer's own."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _json(directory / name).get("eos_token_id")
        found |= set(value if isinstance(value, list) else [] if value is None else [value])
    own = tokenizer.token_to_id(named.get("eos_token", ""))
    if own is not None:
        found.add(own)
    if not found:
        raise DataError(f"{directory} names no end-of-sequence token", "set eos_token_id in its generation_config.json")
    return frozenset(found)


@cache
def _compiled(template: str, date: str) -> jinja2.Template:
    """A template, compiled once, in the environment that chat templates are written for (transformers' conventions)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    available: dict[str, Any] = environment.globals  # jinja2 types it by the defaults it happens to hold
    available.update(raise_exception=_raise, strftime_now=lambda form: clock.local_time(form, date))
    return environment.from_string(template)


def _to_json(value: object, **options: Any) -> str:
    settings: dict[str, Any] = {"ensure_ascii": False, **options}
    return json.dumps(value, **settings)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for those who make masks from it; here it only renders."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's way to name what an extension parses)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body of the block, as if the tag were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _token_text(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else str(value["content"])


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
