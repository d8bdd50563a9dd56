"""For rows of any kind: rows in = rows out + ledger rows, and the text of every message is in the ids."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.inputs import formats, messages, tokenised
from prefpipe.inputs.files import rows
from prefpipe.inputs.tokenised import Limits
from prefpipe.models import template, turns
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import Rules
from prefpipe.schemas import Message

# Tools, calls, reasoning and parts, as a template of today prints them; and one that prints text alone, trimmed.
RICH = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.reasoning_content }}{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
POOR = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = st.sampled_from(
    [
        "Hi",
        " two  words ",
        "é 日本 🦉",
        "",
        " ",
        "a\n\nb",
        "<|im_end|>",
        "<think>x</think>y",
        "half \ud800",
        "{}",
        '"q"',
    ]
)
VALUE = st.one_of(WORDS, st.none(), st.integers(), st.booleans(), st.just([{"type": "text", "text": "part"}]),
                  st.just([{"type": "image"}]))  # fmt: skip
CALL = {"function": {"name": "weather", "arguments": {"town": "Lund"}}}
EXTRA = st.fixed_dictionaries({}, optional={
    "tool_calls": st.sampled_from([[CALL], [], None]), "reasoning_content": WORDS, "name": st.just("n"),
})  # fmt: skip


def message(role: str) -> st.SearchStrategy[Any]:
    return st.builds(lambda content, extra: {"role": role, "content": content, **extra}, VALUE, EXTRA)


PROMPT = st.one_of(
    VALUE,
    st.lists(st.one_of(message("system"), message("user"), message("assistant"), message("tool")), max_size=3),
    st.builds(lambda turn: [turn], message("user")),
)
ANSWER = st.one_of(VALUE, st.builds(lambda turn: [turn], message("assistant")), message("assistant"), st.just([]))
FURTHER = st.fixed_dictionaries({}, optional={
    "tools": st.sampled_from([[CALL], [], None, "[]", "no JSON", 3]), "images": st.sampled_from([[], ["a.png"]]),
    "score_chosen": VALUE, "score_rejected": VALUE, "answer": VALUE,
})  # fmt: skip


def row_of(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    required = {"prompt": PROMPT} | dict.fromkeys(names, ANSWER)
    return st.builds(lambda row, further: {**row, **further}, st.fixed_dictionaries(required), FURTHER)


PREFERENCES = row_of("chosen", "rejected")
LABELS = st.builds(lambda row, label: {**row, "label": label}, row_of("completion"), VALUE)


@pytest.fixture(scope="module", params=[RICH, POOR], ids=["rich", "poor"])
def reader(request: pytest.FixtureRequest, tiny_model: Path) -> Chat:
    text = request.param
    draw = partial(template.render, text, "today", tokens={}, add_generation_prompt=False)
    return replace(load_chat(tiny_model), template=text, shape=turns.shape_of(text, draw))


def written(folder: pytest.TempPathFactory, first: dict[str, Any], found: list[dict[str, Any]]) -> Path:
    path = folder.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [first, *found]))
    return path


def squeezed(text: str) -> str:
    return "".join(text.split())


def check_text(chat: Chat, kind: str, row: dict[str, Any], ids: list[int]) -> None:
    """Every text of the row is in its decoded ids, control tokens aside."""
    decoded = squeezed(chat.tokenizer.decode(ids, skip_special_tokens=False))
    answered = formats.parse(row, kind)
    said: list[Message] = [*answered.prompt, *answered.answers[0]]
    for turn in said:
        assert squeezed(turn["content"]) in decoded
        extra = turns.extra_of(turn)
        assert squeezed(str(extra.get("reasoning_content", ""))) in decoded
        assert all(call["function"]["name"] in decoded for call in extra.get("tool_calls", []))
    tools = json.loads(messages.template_inputs(row) or "{}").get("tools", [])
    assert all(tool["function"]["name"] in decoded for tool in tools)


@pytest.mark.parametrize("control_tokens", ["drop", "escape"])
def test_pairs(reader: Chat, control_tokens: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(PREFERENCES, max_size=6))
    def check(found: list[dict[str, Any]]) -> None:
        path = written(tmp_path_factory, {"prompt": "first", "chosen": "one", "rejected": "two"}, found)
        limits = Limits(rules=Rules(control_tokens))
        _check(reader, "preference", path, partial(tokenised.read_pairs, path, reader, limits), "chosen_token_ids")

    check()


def test_labels(reader: Chat, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(LABELS, max_size=6))
    def check(found: list[dict[str, Any]]) -> None:
        path = written(tmp_path_factory, {"prompt": "first", "completion": "one", "label": True}, found)
        _check(reader, "label", path, partial(tokenised.read_labels, path, reader), "token_ids")

    check()


def _check(chat: Chat, kind: str, path: Path, read: Callable[[], Any], column: str) -> None:
    kept, dropped = read()
    source = list(rows(path))
    assert len(kept) + len(dropped) == len(source)
    assert all(row.reason and row.detail for row in dropped)
    lost = {row.id for row in dropped if not row.reason.startswith(("duplicate", "conflicting"))}
    usable = [row for where, row in source if where not in lost]
    if len(usable) == len(kept):  # no row repeats another one
        for row, result in zip(usable, kept, strict=True):
            check_text(chat, kind, row, [*result.prompt_token_ids, *getattr(result, column)])
