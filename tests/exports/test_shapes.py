"""Rows in the shapes of other trainers, loaded by `datasets`; what a shape cannot say is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from prefpipe.errors import RowFault
from prefpipe.exports import shapes
from prefpipe.schemas import Label, Message, Pair
from tests.stages.train.data import bare_pairs, labels_of

USER, SYSTEM = Message(role="user", content="Weather in Rome?"), Message(role="system", content="Be brief.")
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKING = [SYSTEM, USER, Message(role="assistant", content="", extra=json.dumps({"tool_calls": [CALL]})),
          Message(role="tool", content="21 degrees", extra=json.dumps({"tool_call_id": "c1"}))]  # fmt: skip


def said(content: str, **extra: Any) -> list[Message]:
    message = Message(role="assistant", content=content)
    return [Message(**message, extra=json.dumps(extra))] if extra else [message]


def pair(prompt: list[Message], chosen: list[Message], rejected: list[Message], **inputs: Any) -> Pair:
    told = json.dumps(inputs) if inputs else None
    return replace(bare_pairs(1)[0], prompt=prompt, chosen=chosen, rejected=rejected, template_inputs=told)


def label(prompt: list[Message], completion: list[Message], *, desirable: bool = True) -> Label:
    return replace(labels_of(bare_pairs(1))[0], prompt=prompt, completion=completion, label=desirable)


def loaded(tmp_path: Path, *rows: shapes.Row) -> list[dict[str, Any]]:
    """The rows as `datasets` reads them back."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    return found.to_list()


def test_axolotl(tmp_path: Path) -> None:
    more = [SYSTEM, USER, Message(role="assistant", content="Where?"), Message(role="user", content="Rome.")]
    first, second = (pair(prompt, said("Warm."), said("Dunno.")) for prompt in ([USER], more))
    rows = loaded(tmp_path, shapes.axolotl_pair(first), shapes.axolotl_pair(second))
    assert rows[0] == {
        "messages": [{"role": "user", "content": "Weather in Rome?"}],
        "chosen": {"role": "assistant", "content": "Warm."},
        "rejected": {"role": "assistant", "content": "Dunno."},
    }
    assert rows[1]["messages"] == [dict(message) for message in more]
    good, bad = label([SYSTEM, USER], said("Warm.")), label([USER], said("Dunno."), desirable=False)
    assert loaded(tmp_path / "labels", shapes.axolotl_label(good), shapes.axolotl_label(bad)) == [
        {"system": "Be brief.", "prompt": "Weather in Rome?", "completion": "Warm.", "label": True},
        {"system": "", "prompt": "Weather in Rome?", "completion": "Dunno.", "label": False},
    ]


def test_llama_factory_with_tools(tmp_path: Path) -> None:
    row = pair(ASKING, said("Warm."), said("", tool_calls=[CALL, {"name": "time", "arguments": {}}]), tools=[TOOL])
    (found,) = loaded(tmp_path, shapes.llama_factory_pair(row))
    called = {"name": "weather", "arguments": {"city": "Rome"}}
    assert [turn["from"] for turn in found["conversations"]] == ["human", "function_call", "observation"]
    assert json.loads(found["conversations"][1]["value"]) == called
    assert found["conversations"][2]["value"] == "21 degrees"
    assert found["chosen"] == {"from": "gpt", "value": "Warm."}
    assert found["rejected"]["from"] == "function_call"
    assert json.loads(found["rejected"]["value"]) == [called, {"name": "time", "arguments": {}}]
    assert found["system"] == "Be brief."
    assert json.loads(found["tools"]) == [TOOL["function"]]


def test_llama_factory_labels_end_with_the_answer(tmp_path: Path) -> None:
    rows = [label([USER], said(text), desirable=good) for text, good in (("Warm.", True), ("Dunno.", False))]
    turns = [{"from": "human", "value": "Weather in Rome?"}]
    assert loaded(tmp_path, *map(shapes.llama_factory_label, rows)) == [
        {"conversations": [*turns, {"from": "gpt", "value": text}], "system": "", "tools": "", "kto_tag": good}
        for text, good in (("Warm.", True), ("Dunno.", False))
    ]


def test_nemo_rl(tmp_path: Path) -> None:
    (found,) = loaded(tmp_path, shapes.nemo_rl_pair(pair([SYSTEM, USER], said("Warm."), said("Dunno."))))
    assert found == {
        "context": [dict(SYSTEM), dict(USER)],
        "completions": [
            {"rank": rank, "completion": [{"role": "assistant", "content": text}]}
            for rank, text in enumerate(("Warm.", "Dunno."))
        ],
    }


@pytest.mark.parametrize("form", shapes.TRAINERS)
@pytest.mark.parametrize(
    ("row", "why"),
    [
        (pair([USER], said("Warm.", reasoning_content="hm"), said("No.")), "reasoning"),
        (pair([USER], [*said("a"), USER, *said("b")], said("No.")), "3 turns"),
        (pair([USER], said("Warm."), said("No."), documents=[{"text": "x"}]), "documents"),
        (pair([USER], said("Warm."), said("", tool_calls=[{**CALL, "function": {"arguments": "{"}}])), "tool|JSON"),
        (pair([Message(role="critic", content="x")], said("Warm."), said("No.")), "critic"),
    ],
    ids=["reasoning", "several turns", "documents", "broken call", "other role"],
)
def test_what_no_shape_says_is_refused(form: str, row: Pair, why: str) -> None:
    with pytest.raises(RowFault, match=why):
        shapes.TRAINERS[form].rows["pairs"](row)


@pytest.mark.parametrize("form", ["axolotl", "nemo-rl"])
def test_tools_need_a_shape_with_tools(form: str) -> None:
    for row in (pair(ASKING, said("Warm."), said("No.")), pair([USER], said("Warm."), said("No."), tools=[TOOL])):
        with pytest.raises(RowFault, match="tool"):
            shapes.TRAINERS[form].rows["pairs"](row)


@pytest.mark.parametrize(
    "prompt",
    [[USER, USER], [USER, *said("a")], [*ASKING, ASKING[-1]], [*said("a"), USER], [SYSTEM]],
    ids=["two questions", "an answer at the end", "two results", "an answer first", "no question"],
)
def test_turns_that_llama_factory_would_skip_are_refused(prompt: list[Message]) -> None:
    with pytest.raises(RowFault, match="skips rows"):
        shapes.llama_factory_pair(pair(prompt, said("Warm."), said("No.")))


def test_text_beside_a_call_and_a_long_prompt_for_kto_are_refused() -> None:
    with pytest.raises(RowFault, match="of text or of tool calls"):
        shapes.llama_factory_pair(pair([USER], said("I look.", tool_calls=[CALL]), said("No.")))
    with pytest.raises(RowFault, match="one question for KTO"):
        shapes.axolotl_label(label([USER, *said("a"), USER], said("Warm.")))
