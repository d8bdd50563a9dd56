"""Chat templates: where a model keeps its own, and how one turns messages into text.

A template is rendered in the environment that transformers gives it, so that the text is the same to the letter.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prefpipe import clock
from prefpipe.errors import DataError, MissingInputError, RowFault
from prefpipe.schemas import Message

# Plain-text mode: a prompt, its answer, the end. `opening_token` is empty for a tokenizer that puts none before a text.
PLAIN = (
    "{% if messages | length > 2 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('plain-text mode takes one prompt and one answer') }}{% endif %}"
    "{{ opening_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ closing_token }}{% endif %}{% endfor %}"
)


def find(directory: Path, tokenizer_settings: Mapping[str, Any], choice: str) -> str:
    """The text of a chat template: `choice` is "model" (the template of the model), "none" (plain text) or a file.

    A model keeps its template in chat_template.jinja or in the settings of its tokenizer, the default one among
    several. Raises MissingInputError when there is none.
    """
    if choice == "none":
        return PLAIN
    if choice != "model":
        path = Path(choice)
        if not path.is_file():
            raise MissingInputError(f"chat template {choice} does not exist", "give the path of a Jinja file")
        return path.read_text(encoding="utf-8")
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    inside = tokenizer_settings.get("chat_template")
    if isinstance(inside, list):
        inside = next((t["template"] for t in inside if t["name"] == "default"), None)
    if not isinstance(inside, str):
        raise MissingInputError(
            f"{directory} has no chat template",
            "pass one with --chat-template FILE.jinja, or --chat-template none for plain text",
        )
    return inside


def prints_date(template: str) -> bool:
    """Whether a template asks for the time of day, so that its text depends on the day."""
    return "strftime_now" in template


def render(
    template: str, date: str, messages: Sequence[Message], tokens: Mapping[str, str], *, add_generation_prompt: bool
) -> str:
    """The text of a conversation, as transformers' `apply_chat_template` gives it.

    `date` is the day that the template prints (YYYY-MM-DD, or "today"), `tokens` are the named tokens of the tokenizer
    (`bos_token` and so on), `add_generation_prompt` asks for the opening of the next answer.

    Raises DataError for a template that is not Jinja, RowFault when the template refuses the messages.
    """
    try:
        return _compiled(template, date).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **tokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: {error}", "fix it, or pass --chat-template FILE"
        ) from error
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise RowFault("template_refused", str(error)) from error


@cache
def _compiled(template: str, date: str) -> jinja2.Template:
    """A template with the filters, functions and tags that transformers offers, compiled once."""
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
    """`{% generation %}` marks what the assistant says, so that transformers can make masks; here it only renders."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's way to name what an extension parses)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body of the block, as if the tag were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
