"""The only caller of chat templates and tokenizers: messages to token ids and back. Torch-free.

A chat template is applied once, when a prompt enters the pipeline; from then on token ids travel.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from prefpipe import fingerprint, fsio
from prefpipe.errors import DataError, MissingInputError
from prefpipe.schemas import Message

_ROLES = ("system", "user", "assistant")


class RowFault(Exception):
    """One row that cannot be used: a reason word for the ledger, and the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Chat:
    """A tokenizer, a chat template and what ends a completion."""

    tokenizer: Tokenizer
    template: str
    named_tokens: dict[str, str]
    eos_token_ids: frozenset[int]
    control_tokens: tuple[str, ...]
    digests: dict[str, str]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)


def load(directory: Path, chat_template: str = "model") -> Chat:
    """Read tokenizer, template and end-of-sequence ids of a model directory.

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
    template = _template(directory, settings, chat_template)
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special or t.content in template]
    return Chat(
        tokenizer=tokenizer,
        template=template,
        named_tokens=named,
        eos_token_ids=_eos_ids(directory, tokenizer, named),
        control_tokens=tuple(special),
        digests={
            "tokenizer": fingerprint.tokenizer_digest(directory),
            "chat_template": fingerprint.text_digest(template),
        },
    )


def encode_prompt(chat: Chat, messages: Sequence[Message], *, max_tokens: int, control_tokens: str) -> list[int]:
    """Token ids of a prompt, ready for the answer. Raises RowFault for a prompt that cannot be used.

    `control_tokens` is "drop" (a message that spells one is a fault) or "allow".
    """
    _check_messages(messages)
    if control_tokens == "drop":
        check_control_tokens(chat, messages)
    ids = encode(chat, render(chat, messages, add_generation_prompt=True))
    if len(ids) > max_tokens:
        raise RowFault("too_long", f"{len(ids)} tokens, max_prompt_tokens is {max_tokens}")
    return ids


def check_control_tokens(chat: Chat, messages: Sequence[Message]) -> None:
    """Raise RowFault when a message spells a control token, which would be tokenised as one."""
    for message in messages:
        spelled = next((t for t in chat.control_tokens if t in message["content"]), None)
        if spelled is not None:
            raise RowFault("control_tokens", f"the {message['role']} message spells {spelled}")


def render(chat: Chat, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The chat template applied to messages, as transformers' apply_chat_template does it.

    Raises RowFault when the template refuses the messages.
    """
    try:
        compiled = _environment().from_string(chat.template)
        return compiled.render(
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
    return chat.tokenizer.encode(text, add_special_tokens=False).ids


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages or not any(m["content"].strip() for m in messages):
        raise RowFault("empty", "no message with text")
    roles = [m["role"] for m in messages]
    unknown = next((r for r in roles if r not in _ROLES), None)
    if unknown is not None:
        raise RowFault("bad_roles", f"unknown role {unknown!r}")
    if "system" in roles[1:] or roles[-1] != "user":
        raise RowFault("bad_roles", f"a prompt ends with a user message, system comes first; roles are {roles}")


def _template(directory: Path, settings: dict[str, Any], chosen: str) -> str:
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
        raise MissingInputError(f"{directory} has no chat template", "pass one with --chat-template FILE.jinja")
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


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for (transformers' conventions)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    available: dict[str, Any] = environment.globals  # jinja2 types it by the defaults it happens to hold
    available.update(raise_exception=_raise, strftime_now=fsio.local_time)
    return environment


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
