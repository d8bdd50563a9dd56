"""Every chat template that trl installs: it renders as in transformers, or a row fault says what would be lost."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prefpipe.errors import RowFault
from prefpipe.inputs import formats
from prefpipe.inputs.messages import messages, template_inputs
from prefpipe.inputs.tokenised import Limits, tokenise
from prefpipe.models import template, turns
from prefpipe.models.chat import Chat
from prefpipe.models.encoding import Rules, render, rendered
from prefpipe.models.template import marks_assistant
from prefpipe.schemas import Message
from tests.models.cases import SHAPES

_TRL = find_spec("trl")
TEMPLATES = sorted((Path(_TRL.origin).parent / "chat_templates").glob("*.jinja")) if _TRL and _TRL.origin else []
THINKING = {"role": "assistant", "content": "<think>\nShort or long?\n</think>\n\nThe owl."}
CONVERSATIONS: dict[str, Any] = {**SHAPES, "thoughts": [*SHAPES["one turn"], THINKING]}


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "current_weather",
            "description": "The weather in a town.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "Its name."}},
                "required": ["town"],
            },
        },
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "current_weather", "arguments": {"town": "Lund"}}}
    ],
}
RESULT = {"role": "tool", "name": "current_weather", "tool_call_id": "call00001", "content": "8 degrees, rain"}
ASK, TELL = {"role": "user", "content": "Is it raining in Lund?"}, {"role": "assistant", "content": "Yes, heavily."}
RICH: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "a call": ([ASK, CALL], {"tools": TOOLS}),
    "a result": ([ASK, CALL, RESULT, TELL], {"tools": TOOLS}),
    "reasoning": ([ASK, TELL | {"reasoning_content": "Lund is in Sweden."}], {}),
    "thinking off": ([ASK, TELL], {"chat_template_kwargs": {"enable_thinking": False}}),
    "documents": ([ASK, TELL], {"documents": [{"title": "News", "text": "It rains in Lund."}]}),
    "no tools": ([{"role": "system", "content": "Be brief."}, ASK, TELL], {"tools": []}),
}


def shaped(path: Path, chat: Chat) -> Chat:
    """The chat of the tiny model with another template."""
    text = path.read_text(encoding="utf-8")
    draw = partial(template.render, text, "today", tokens=chat.named_tokens, add_generation_prompt=False)
    return replace(chat, template=text, date="today", shape=turns.shape_of(text, draw))


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_trl_render_as_in_transformers(path: Path, chat: Chat, oracle: Any) -> None:
    """Those of plain text, whatever they do with it."""
    dated = replace(chat, template=path.read_text(encoding="utf-8"), date="today")
    for conversation in CONVERSATIONS.values():
        for opens in (True, False):
            theirs = apply(oracle, dated.template, conversation, {}, opens=opens)
            try:
                ours = render(dated, conversation, add_generation_prompt=opens)
            except RowFault:
                assert theirs is None
                continue
            assert ours == theirs


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", RICH)
def test_calls_tools_reasoning_and_documents_reach_the_template_or_the_row_is_a_fault(
    path: Path, name: str, chat: Chat, oracle: Any
) -> None:
    """Where transformers shows all of a conversation, the text is the same. Where it refuses it or leaves something
    out, such as content for a template that wants parts, ours shows all or is a fault."""
    raw, row = RICH[name]
    parsed, inputs = messages(raw, "messages", "user"), template_inputs(row)
    changed = shaped(path, chat)
    theirs = apply(oracle, changed.template, raw, row, opens=False)
    complete = theirs is not None and holds_all(parsed, row, theirs)
    if complete:
        assert rendered(changed, parsed, inputs, Rules("allow"), add_generation_prompt=False).text == theirs
        return
    try:
        ours = rendered(changed, parsed, inputs, Rules("allow"), add_generation_prompt=False).text
    except RowFault:
        return
    assert holds_all(parsed, row, ours)


OWL, TIT = {"role": "assistant", "content": "The owl 🦉."}, {"role": "assistant", "content": "A tit."}
BIRD, MORE = {"role": "user", "content": "Name a bird."}, {"role": "user", "content": "Another?"}
TRACES: dict[str, tuple[list[Any], list[Any], dict[str, Any]]] = {
    "tools": ([ASK], [CALL, RESULT, TELL], {"tools": TOOLS}),
    "user": ([BIRD], [OWL, MORE, TIT], {}),
    "both": ([ASK], [CALL, RESULT, TELL, MORE, CALL | {"content": "Again."}, RESULT, TELL], {"tools": TOOLS}),
    "reasoning": ([ASK], [CALL, RESULT, TELL | {"reasoning_content": "Lund is in Sweden."}], {"tools": TOOLS}),
}
MARKED = [path for path in TEMPLATES if marks_assistant(path.read_text(encoding="utf-8"))]


@pytest.mark.skipif(not MARKED, reason="trl is not installed")
@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
def test_the_tokens_that_are_scored_are_those_that_transformers_marks(path: Path, chat: Chat, oracle: Any) -> None:
    """Of every answer of several turns that transformers shows in full; of a template that wants content in parts,
    which it is not given here, there is none."""
    changed = shaped(path, chat)
    compared = [name for name in TRACES if same_marks(name, changed, oracle)]
    assert compared or changed.shape.in_parts


def same_marks(name: str, chat: Chat, oracle: Any) -> bool:
    """Compare the ids and the mask up to the end of the answer; False where transformers does not show all of it."""
    prompt, answer, row = TRACES[name]
    raw = [*prompt, *answer]
    theirs = apply(oracle, chat.template, raw, row, opens=False)
    if theirs is None or not holds_all(messages(raw, "messages", "user"), row, theirs):
        return False
    parsed = formats.parse({"prompt": prompt, "completion": answer, **row}, "completion")
    ours = tokenise(parsed, chat, Limits(rules=Rules("allow", "allow")))
    marked = oracle.apply_chat_template(
        raw, chat_template=chat.template, return_dict=True, return_assistant_tokens_mask=True, tools=row.get("tools")
    )
    begin = len(ours.prompt_ids)
    end = begin + len(ours.token_ids[0])
    assert marked["input_ids"][:end] == [*ours.prompt_ids, *ours.token_ids[0]]
    assert marked["assistant_masks"][begin:end] == list(map(int, ours.masks[0] or []))
    assert oracle.decode(marked["input_ids"][end:]).strip() == ""
    return True


def holds_all(parsed: Sequence[Message], row: dict[str, Any], text: str) -> bool:
    return turns.lost(parsed, text) is None and turns.lost_input(row, text) is None


def apply(oracle: Any, text: str, messages: Any, row: dict[str, Any], *, opens: bool) -> str | None:
    """The rendering of transformers; None where the template refuses."""
    inputs = {
        "tools": row.get("tools") or None,
        "documents": row.get("documents"),
        **row.get("chat_template_kwargs", {}),
    }
    try:
        return oracle.apply_chat_template(
            messages, chat_template=text, add_generation_prompt=opens, tokenize=False, **inputs
        )
    except Exception:
        return None
