"""Agent traces, a chat template that marks what of them the assistant says, and the rows of whole files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefpipe.inputs import tokenised
from prefpipe.inputs.tokenised import Limits
from prefpipe.models.chat import Chat
from prefpipe.schemas import Completion, Dropped, Label, Pair

# Around every turn ChatML; the marks hold what the model writes: reasoning, text, calls and the end of the turn.
MARKED = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.reasoning_content }}{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ASK = {"role": "user", "content": "Does it rain?"}


def calling(town: str, **further: Any) -> dict[str, Any]:
    """A turn of the assistant that asks for the weather of a town."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": town}}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **further}


def result(content: str) -> dict[str, Any]:
    """What the tool says."""
    return {"role": "tool", "name": "weather", "content": content}


def said(content: str) -> dict[str, Any]:
    """A turn of the assistant."""
    return {"role": "assistant", "content": content}


TRACE = [calling("Lund"), result("rain, 8 degrees"), said("Yes.")]
SHORT = [calling("Kiel"), result("dry"), said("No.")]
LONG = [*TRACE, {"role": "user", "content": "And in Kiel?"}, calling("Kiel"), result("dry"), said("There it is dry.")]


def read_pairs(
    path: str | Path, chat: Chat, limits: Limits = Limits(), columns: Mapping[str, str] | None = None
) -> tuple[list[Pair], list[Dropped]]:
    """All pairs of a file, and its faulty rows."""
    dropped: list[Dropped] = []
    return list(tokenised.read_pairs(path, chat, limits, columns, dropped)), dropped


def read_labels(
    path: str | Path, chat: Chat, limits: Limits = Limits(), columns: Mapping[str, str] | None = None
) -> tuple[list[Label], list[Dropped]]:
    """All labels of a file, and its faulty rows."""
    dropped: list[Dropped] = []
    return list(tokenised.read_labels(path, chat, limits, columns, dropped)), dropped


def read_completions(
    path: str | Path, chat: Chat, limits: Limits = Limits(), columns: Mapping[str, str] | None = None
) -> tuple[list[Completion], list[Dropped]]:
    """All completions of a file, and its faulty rows."""
    dropped: list[Dropped] = []
    return list(tokenised.read_completions(path, chat, limits, columns, dropped)), dropped
