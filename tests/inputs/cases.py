"""Agent traces, and a chat template that marks what of them the assistant says."""

from typing import Any

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
