"""Tool calls, reasoning and tools travel from a file to token ids and back out; what cannot travel is in the ledger."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from prefpipe.runs import store, tables
from prefpipe.schemas import Completion, Dropped, Pair, Prompt, Reward, from_table
from tests.conftest import Call, Write

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if quick %}quick: {% endif %}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def calling(town: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"town": town}}}]}]  # fmt: skip


ASK = [{"role": "user", "content": "Does it rain?"}]
TWO_CALLS = {"prompt": ASK, "tools": TOOLS, "chosen": calling("Lund"), "rejected": calling("Kiel")}
REASONED = {
    "prompt": "How many?",
    "chosen": [{"role": "assistant", "content": "Three.", "reasoning_content": "One and two."}],
    "rejected": "Four.",
}
AFTER_A_RESULT = {
    "prompt": [*ASK, *calling("Lund"), {"role": "tool", "name": "weather", "content": "dry"}],
    "tools": json.dumps(TOOLS),
    "chosen": "No.",
    "rejected": "Yes.",
}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "tools.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture
def score(call: Call, tiny_model: Path, template: Path) -> Any:
    def run(inputs: Path, out: Path, *arguments: object, code: int = 0) -> Any:
        done = call(
            *("score", "--model", tiny_model, "--inputs", inputs, "--out", out, "--engine", "fake", "--check", 0),
            *("--chat-template", template, *arguments),
        )
        assert done.code == code, done.stderr
        return done

    return run


def pairs_of(run: Path) -> list[Pair]:
    return from_table(Pair, store.read_dataset(run, "pairs", Pair))


def ledger(run: Path) -> list[tuple[str, str]]:
    rows = from_table(Dropped, tables.read_table(run / "dropped.parquet", Dropped))
    return [(row.id.rpartition(", ")[2], row.reason) for row in rows]


def test_calls_reasoning_and_tools_are_in_the_ids(score: Any, write: Write, chat: Any, tmp_path: Path) -> None:
    score(write(TWO_CALLS, REASONED, AFTER_A_RESULT), tmp_path / "s")
    assert ledger(tmp_path / "s") == []
    called, reasoned, after = pairs_of(tmp_path / "s")
    assert chat.decode(called.chosen_token_ids) == '[weather {"town": "Lund"}]'
    assert chat.decode(called.rejected_token_ids) == '[weather {"town": "Kiel"}]'
    assert '"name": "weather"' in chat.decode(called.prompt_token_ids)
    assert json.loads(called.template_inputs or "") == {"tools": TOOLS}
    assert chat.decode(reasoned.chosen_token_ids) == "<think>One and two.</think>Three."
    assert "dry" in chat.decode(after.prompt_token_ids)
    completions = from_table(Completion, store.read_dataset(tmp_path / "s", "completions", Completion))
    ids = [ids for p in (called, reasoned, after) for ids in (p.chosen_token_ids, p.rejected_token_ids)]
    assert {(c.thinking or "") + c.text for c in completions} == set(chat.decode_all(ids))
    assert [c.text for c in completions if c.thinking] == ["Three."]


def test_they_come_back_out_for_trl(score: Any, write: Write, call: Call, tmp_path: Path) -> None:
    """By way of completions and ratings, in the form that TRL reads, with every key as it was."""
    rated = {"score_chosen": 2, "score_rejected": 1}
    score(write(TWO_CALLS | rated, REASONED | rated), tmp_path / "s")
    done = call(
        *("build-pairs", "--completions", tmp_path / "s", "--reward", "rating", "--format", "trl"),
        *("--out", tmp_path / "t", "--truncated-chosen", "keep"),
    )
    assert done.code == 0, done.stderr
    files = str(tmp_path / "t" / "trl" / "*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    by_prompt = {row["prompt"][0]["content"]: row for row in rows}
    called, reasoned = by_prompt["Does it rain?"], by_prompt["How many?"]
    assert (called["chosen"], called["rejected"]) == (calling("Lund"), calling("Kiel"))
    assert (json.loads(called["tools"]), called["chat_template_kwargs"]) == (TOOLS, {})
    assert (reasoned["chosen"], reasoned["tools"]) == (REASONED["chosen"], None)
    refused = call(
        *("build-pairs", "--completions", tmp_path / "s", "--reward", "rating", "--format", "trl-standard"),
        *("--out", tmp_path / "u"),
    )
    assert refused.code == 65
    assert "plain text holds no roles, calls or tools" in refused.stderr


def test_what_a_row_says_of_the_template_goes_before_the_setting(
    score: Any, write: Write, chat: Any, tmp_path: Path
) -> None:
    row = {"prompt": "Hi", "chosen": "quick: a", "rejected": "quick: b"}
    other = {"prompt": "Ho", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"quick": False}}
    score(write(row, other), tmp_path / "s", "--chat-template-kwargs", '{"quick": true}')
    first, second = pairs_of(tmp_path / "s")
    assert chat.decode(first.chosen_token_ids) == "a"
    assert chat.decode(second.chosen_token_ids) == "a"
    assert "quick" in chat.decode(first.prompt_token_ids)
    assert "quick" not in chat.decode(second.prompt_token_ids)


def test_a_template_without_tools_leaves_rows_in_the_ledger(
    call: Call, tiny_model: Path, write: Write, tmp_path: Path
) -> None:
    """The template of the model prints role and content. Each row says what would be lost; the setting allows it."""
    inputs = write({"prompt": "Hi", "chosen": "a", "rejected": "b"}, TWO_CALLS, REASONED)
    command = ("score", "--model", tiny_model, "--inputs", inputs, "--engine", "fake", "--check", 0)
    assert call(*command, "--out", tmp_path / "s").code == 0
    assert ledger(tmp_path / "s") == [("line 2", "template_changes"), ("line 3", "template_changes")]
    details = tables.read_table(tmp_path / "s" / "dropped.parquet", Dropped)["detail"].to_pylist()
    assert "leaves out the tool 'weather'" in details[0]
    assert "leaves out reasoning_content 'One and two.' of message 1 (assistant)" in details[1]
    assert call(*command, "--out", tmp_path / "t", "--template-changes", "allow").code == 0
    assert ledger(tmp_path / "t") == [("line 2", "empty")]


def test_generate_gives_tools_to_the_template(
    call: Call, tiny_model: Path, template: Path, write: Write, chat: Any, tmp_path: Path
) -> None:
    prompts = write({"messages": ASK, "tools": TOOLS}, {"messages": ASK}, {"messages": ASK, "images": ["a.png"]})
    done = call(
        *("generate", "--model", tiny_model, "--prompts", prompts, "--engine", "fake", "--num-samples", 1),
        *("--chat-template", template, "--check", 0, "--out", tmp_path / "g"),
    )
    assert done.code == 0, done.stderr
    with_tools, without = from_table(Prompt, store.read_dataset(tmp_path / "g", "prompts", Prompt))
    assert (json.loads(with_tools.template_inputs or ""), without.template_inputs) == ({"tools": TOOLS}, None)
    completions = from_table(Completion, store.read_dataset(tmp_path / "g", "completions", Completion))
    assert ["weather" in chat.decode(c.prompt_token_ids) for c in completions] == [True, False]
    assert ledger(tmp_path / "g") == [("line 3", "not_carried")]


def test_train_reads_them_as_score_does(
    call: Call, tiny_model: Path, template: Path, write: Write, tmp_path: Path
) -> None:
    rows = [TWO_CALLS, REASONED, AFTER_A_RESULT, {"prompt": "Hi", "chosen": None, "rejected": "b"}]
    command = ("train", "--model", tiny_model, "--dtype", "float32", "--num-train-epochs", 1, "--out", tmp_path / "t")
    done = call(*command, "--pairs", write(*rows), "--chat-template", template)
    assert done.code == 0, done.stderr
    assert ledger(tmp_path / "t") == [("line 4", "null")]
    assert json.loads((tmp_path / "t" / "manifest.json").read_text())["totals"]["pairs"] == 3


def test_when_no_row_is_left_the_message_and_the_ledger_say_why(
    call: Call, tiny_model: Path, write: Write, tmp_path: Path
) -> None:
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    path = write(row | {"chosen": " "}, row | {"rejected": None}, row | {"chosen": ""})
    for command in (("train", "--pairs", path), ("score", "--inputs", path, "--engine", "fake", "--check", 0)):
        out = tmp_path / str(command[0])
        done = call(command[0], "--model", tiny_model, "--out", out, *command[1:])
        assert done.code == 65
        assert f"2 empty, 1 null (first: {path}, line 1: an answer without text)" in done.stderr
        assert not (out / "manifest.json").exists()
    assert ledger(tmp_path / "train") == [("line 1", "empty"), ("line 2", "null"), ("line 3", "empty")]


def test_text_that_is_templated_already(call: Call, tiny_model: Path, write: Write, chat: Any, tmp_path: Path) -> None:
    opening = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    path = write({"prompt": opening, "chosen": "a<|im_end|>", "rejected": "b<|im_end|>"})
    done = call(
        *("train", "--model", tiny_model, "--pairs", path, "--dtype", "float32", "--num-train-epochs", 1),
        *("--chat-template", "none", "--special-tokens-in-prompts", "allow", "--out", tmp_path / "t"),
    )
    assert done.code == 0, done.stderr
    done = call(
        *(
            "score",
            "--model",
            tiny_model,
            "--inputs",
            path,
            "--engine",
            "fake",
            "--check",
            0,
            "--chat-template",
            "none",
        ),
        *("--special-tokens-in-prompts", "allow", "--out", tmp_path / "s"),
    )
    assert done.code == 0, done.stderr
    (row,) = pairs_of(tmp_path / "s")
    assert row.chosen_token_ids == [*chat.tokenizer.encode("a", add_special_tokens=False).ids, 2]


def rewarded(run: Path, name: str) -> list[float | None]:
    return [r.reward for r in from_table(Reward, store.read_dataset(run, f"rewards/{name}", Reward))]


def test_rewards_and_filters_see_the_answer_and_training_sees_all(
    score: Any, write: Write, call: Call, chat: Any, tmp_path: Path
) -> None:
    """Of 12 and 22 words a reward that wants at most 2 sees one each; both answers are the same text."""
    rows = [
        {"prompt": "How many?", "completion": f"<think>{'one ' * n}</think>\n\nThree."} for n in (10, 20)
    ]  # fmt: skip
    reward = ("--rewards", "short", "--reward-settings", '{"short": {"kind": "length", "max": 2}}')
    path = write(*rows)
    score(path, tmp_path / "s", *reward)
    score(path, tmp_path / "all", *reward, "--reward-on", "all")
    assert rewarded(tmp_path / "s", "short") == [1.0, 1.0]
    assert max(rewarded(tmp_path / "all", "short")) < 0.5  # type: ignore[type-var]  # no null among them
    completions = from_table(Completion, store.read_dataset(tmp_path / "s", "completions", Completion))
    assert [c.text for c in completions] == ["Three.", "Three."]
    for row, completion in zip(rows, completions, strict=True):
        assert chat.decode(completion.token_ids) == row["completion"] == (completion.thinking or "") + completion.text
    command = ("build-pairs", "--completions", tmp_path / "all", "--reward", "short", "--out", tmp_path / "p")
    done = call(*command, "--gap-filter", "none")
    assert "identical_text: 1" in done.stderr + done.stdout
    three = write(*rows, {"prompt": "How many?", "completion": "That is not known."}, name="three.jsonl")
    score(three, tmp_path / "three", *reward)
    done = call("build-pairs", "--completions", tmp_path / "three", "--reward", "short", "--out", tmp_path / "q")
    assert done.code == 0, done.stderr
    report = json.loads((tmp_path / "q" / "data_report.json").read_text())
    assert report["thinking"]["completions"] == 2
