"""Chat templates: the choice of the template of a model, and the rendering of messages.

transformers compiles and renders a template, so that the text is the same to the letter.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from prefpipe import clock, reading
from prefpipe.errors import DataError, MissingInputError, RowFault

Span = tuple[int, int]  # of characters: the first one, and the one behind the last
NO_INPUTS: Mapping[str, Any] = {}
_MOST_CHARACTERS = 64 << 20  # of a rendering
_RENDERING = threading.Lock()  # a compiled template has one tracker of spans, and refuses a second rendering meanwhile
_MOST_STEPS = 1_000_000  # of all loops over a range in one rendering: a template comes with a model, from anywhere
# Plain-text mode: a prompt, its answer, the end. `opening_token` is empty for a tokenizer that puts none before a text.
PLAIN = (
    "{% if messages | length > 2 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('plain-text mode takes one prompt and one answer') }}{% endif %}"
    "{{ opening_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ closing_token }}{% endif %}{% endfor %}"
)


def find(directory: Path, of_model: str | Mapping[str, str] | None, choice: str) -> str:
    """The text of a chat template.

    `of_model` is the template of the model, or several by name. `choice` is "model" (that template, or the one named
    "default"), "none" (plain text), the name of one among several, or a file. Raises MissingInputError when it is not
    there.
    """
    if choice == "none":
        return PLAIN
    named = of_model if isinstance(of_model, Mapping) else {"default": of_model}
    chosen = named.get("default" if choice == "model" else choice)
    if chosen is not None:
        return chosen
    if choice != "model":
        path = Path(choice)
        if not path.is_file():
            raise MissingInputError(f"chat template {choice} does not exist", "give the path of a Jinja file")
        return reading.read_text(path)
    if isinstance(of_model, Mapping) and of_model:
        raise MissingInputError(
            f"{directory} has several chat templates and no default one: {', '.join(sorted(of_model))}",
            f"pass the name of one, such as --chat-template {min(of_model)}",
        )
    raise MissingInputError(
        f"{directory} has no chat template",
        "pass one with --chat-template FILE.jinja, or --chat-template none for plain text",
    )


def prints_date(template: str) -> bool:
    """Whether a template reads the clock, so that its text depends on the day."""
    return "strftime_now" in template


def marks_assistant(template: str) -> bool:
    """Whether a template can mark the text of the assistant, with `{% generation %}` and `{% endgeneration %}`."""
    return "endgeneration" in template


def render(
    template: str,
    date: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    inputs: Mapping[str, Any] = NO_INPUTS,
    *,
    add_generation_prompt: bool,
) -> str:
    """The text of a conversation, as transformers' `apply_chat_template` returns it; see `render_with_spans`."""
    return render_with_spans(template, date, messages, tokens, inputs, add_generation_prompt=add_generation_prompt)[0]


def render_with_spans(
    template: str,
    date: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    inputs: Mapping[str, Any] = NO_INPUTS,
    *,
    add_generation_prompt: bool,
) -> tuple[str, list[Span]]:
    """The text of a conversation, and what of it stands between `{% generation %}` and `{% endgeneration %}`.

    `date` is the day that the template prints (YYYY-MM-DD, or "today"), `tokens` are the named tokens of the tokenizer
    (`bos_token` and so on), `inputs` what the template gets beside: tools, documents, `chat_template_kwargs`;
    `add_generation_prompt` asks for the opening of the next answer. In plain-text mode a text that begins with the
    opening token gets no second one.

    Raises DataError for a template that is not Jinja, RowFault when the template refuses the messages or loops and
    writes without end.
    """
    variables = dict(tokens) | {"tools": None, "documents": None} | inputs.get("chat_template_kwargs", {})
    variables |= {name: inputs[name] for name in ("tools", "documents") if inputs.get(name)}
    if template == PLAIN and messages and messages[0]["content"].startswith(tokens.get("opening_token", "")):
        variables["opening_token"] = ""
    variables |= {
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
        "range": _bounded_range(),
        "strftime_now": lambda form: clock.local_time(form, date),  # pyright: ignore[reportUnknownLambdaType]
    }
    blocks: list[str] = []
    spans: list[Span] = []
    try:
        compiled = _compiled(template)
        with _RENDERING, compiled.environment.activate_tracker(blocks, spans):
            for block in compiled.generate(**variables):
                blocks.append(block)  # noqa: PERF402  (the tracker reads the list as it grows)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: {error}", "fix it, or pass --chat-template FILE"
        ) from error
    except Exception as error:  # a template raises whatever Python raises for its expressions
        raise RowFault("template_refused", (str(error) or type(error).__name__)[:500]) from error
    text = "".join(blocks)
    if len(text) > _MOST_CHARACTERS:
        raise RowFault("template_refused", f"it writes {len(text)} characters")
    return text, spans


def _bounded_range() -> Callable[..., range]:
    """`range` for one rendering. Raises ValueError when its ranges have too many steps together."""
    steps = 0

    def bounded(*arguments: int) -> range:
        nonlocal steps
        found = range(*arguments)
        steps += len(found)
        if steps > _MOST_STEPS:
            raise ValueError(f"loops of more than {_MOST_STEPS} steps")
        return found

    return bounded


@cache
def _compiled(template: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template  # pyright: ignore[reportPrivateUsage]

    return _compile_jinja_template(template)
