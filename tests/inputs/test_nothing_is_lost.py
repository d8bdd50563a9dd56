"""For rows of any kind: rows in = rows out + ledger rows, and the text of every message is in the ids."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.inputs import formats, messages
from prefpipe.inputs.files import rows
from prefpipe.inputs.tokenised import Limits
from prefpipe.models import template, turns
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import Rules
from prefpipe.schemas import Message
from tests.inputs.cases import MARKED, read_labels, read_pairs

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
WORDS = st.sampled_from(["Hi", " two  words ", "é 日本 🦉", "a\n\nb", "<think>x</think>y", "{}", "No.", "Go on."])
ODD = st.sampled_from(
    ["", " ", "<|im_end|>", "half \ud800", None, 3, 2.5, True, [{"type": "text", "text": "part"}], [{"type": "image"}]]
)


def mostly(good: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda n: good if n else odd)


VALUE = mostly(WORDS, ODD)
CALL = {"function": {"name": "weather", "arguments": {"town": "Lund"}}}
EXTRA = mostly(
    st.sampled_from([{}, {"tool_calls": [CALL]}, {"reasoning_content": "because"}, {"tool_calls": None, "name": None}]),
    st.sampled_from(
        [{"reasoning_content": ""}, {"tool_calls": []}, {"tool_calls": [{"function": {"arguments": "{"}}]}]
    ),
)


def message(role: str) -> st.SearchStrategy[Any]:
    extra = EXTRA if role == "assistant" else st.just({})
    return st.builds(lambda content, extra: {"role": role, "content": content, **extra}, VALUE, extra)


SOUND = st.sampled_from([("user",), ("system", "user"), ("user", "assistant", "user"), ("user", "assistant", "tool")])
ODD_ROLES = st.sampled_from([(), ("assistant",), ("user", "system", "user"), ("poet",), ("user", "assistant")])


def conversation(roles: tuple[str, ...]) -> st.SearchStrategy[Any]:
    return st.tuples(*map(message, roles)).map(list)


PROMPT = st.one_of(VALUE, mostly(SOUND, ODD_ROLES).flatmap(conversation))
ANSWER = st.one_of(VALUE, message("assistant"), message("assistant").map(lambda turn: [turn]))
FURTHER = mostly(
    st.sampled_from([{}, {"tools": [CALL]}, {"tools": []}, {"images": [], "answer": 7}]),
    st.sampled_from([{"tools": "no JSON"}, {"tools": 3}, {"images": ["a.png"]}, {"answer": [1]}]),
)


def row_of(*names: str, answer: st.SearchStrategy[Any] = ANSWER) -> st.SearchStrategy[dict[str, Any]]:
    required = {"prompt": PROMPT} | dict.fromkeys(names, answer)
    return st.builds(lambda row, further: {**row, **further}, st.fixed_dictionaries(required), FURTHER)


PREFERENCES = row_of("chosen", "rejected")
TURNS = mostly(
    st.sampled_from(
        [
            ("assistant", "tool", "assistant"),
            ("assistant", "tool", "tool", "assistant", "user", "assistant"),
            ("assistant", "assistant"),
        ]
    ),
    st.sampled_from([("assistant", "tool"), ("tool", "assistant"), ("assistant", "system", "assistant"), ()]),
)
TRACES = row_of("chosen", "rejected", answer=ANSWER | TURNS.flatmap(conversation))
CLASSES = mostly(st.booleans(), st.sampled_from(["yes", 0, None, "?"]))
LABELS = st.builds(lambda row, label: {**row, "label": label}, row_of("completion"), CLASSES)


@pytest.fixture(scope="module", params=[RICH, POOR, MARKED], ids=["rich", "poor", "marked"])
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


def check_text(chat: Chat, kind: str, row: dict[str, Any], ids: list[int], place: int = 0) -> None:
    """Every text of the prompt and of an answer is in the decoded ids, control tokens aside."""
    decoded = squeezed(chat.tokenizer.decode(ids, skip_special_tokens=False))
    answered = formats.parse(row, kind)
    said: list[Message] = [*answered.prompt, *answered.answers[place]]
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
        _check(reader, "preference", path, partial(read_pairs, path, reader, limits), "chosen_token_ids")

    check()


@pytest.mark.parametrize("control_tokens", ["drop", "escape"])
def test_traces(reader: Chat, control_tokens: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the template marks the assistant's part, its texts are scored and those of others are not; where it does
    not, an answer of several turns is in the ledger."""
    limits, checked = Limits(rules=Rules(control_tokens)), 0

    @settings(max_examples=60, deadline=None)
    @given(st.lists(TRACES, max_size=6))
    def check(found: list[dict[str, Any]]) -> None:
        nonlocal checked
        path = written(tmp_path_factory, {"prompt": "first", "chosen": "one", "rejected": "two"}, found)
        pairs, dropped = read_pairs(path, reader, limits)
        source = list(rows(path))
        assert len(pairs) + len(dropped) == len(source)
        lost = {row.id for row in dropped}
        for (_, row), pair in zip([r for r in source if r[0] not in lost], pairs, strict=True):
            answered = formats.parse(row, "preference")
            for place, side in enumerate(("chosen", "rejected")):
                ids, mask = getattr(pair, f"{side}_token_ids"), getattr(pair, f"{side}_loss_mask")
                check_text(reader, "preference", row, [*pair.prompt_token_ids, *ids], place)
                assert (mask is None) == (len(answered.answers[place]) == 1)
                if mask is not None:
                    checked += 1
                    check_mask(reader, answered.answers[place], ids, mask)

    check()
    assert (checked > 0) == (reader.template == MARKED)


def check_mask(chat: Chat, answer: list[Message], ids: list[int], mask: list[bool]) -> None:
    """Its runs are the turns of the assistant, each with its texts and an end, and no more tokens."""
    runs = [[i for i, _ in run] for scored, run in groupby(zip(ids, mask, strict=True), lambda p: p[1]) if scored]
    said = [turn for turn in answer if turn["role"] == "assistant"]
    assert len(runs) == len(said)
    for run, turn in zip(runs, said, strict=True):
        calls = [json.dumps(call["function"]) for call in turns.extra_of(turn).get("tool_calls", [])]
        text = turns.extra_of(turn).get("reasoning_content", "") + turn["content"] + "".join(calls)
        assert chat.tokenizer.decode(run, skip_special_tokens=False) == text + "<|im_end|>"


def test_labels(reader: Chat, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(LABELS, max_size=6))
    def check(found: list[dict[str, Any]]) -> None:
        path = written(tmp_path_factory, {"prompt": "first", "completion": "one", "label": True}, found)
        _check(reader, "label", path, partial(read_labels, path, reader), "token_ids")

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
