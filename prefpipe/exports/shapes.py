"""Pairs and labels in the formats that other trainers document (docs/exports.md).

These trainers silently drop keys of messages that they do not know, and rows whose turns are in an order that they do
not expect. A row that would change in this way is refused, with the reason.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefpipe.errors import RowFault
from prefpipe.models.turns import REASONING, as_dict
from prefpipe.schemas import Label, Message, Pair

Row = dict[str, Any]
_ROLES = ("system", "user", "assistant", "tool")
_INPUT_ROLES, _OUTPUT_ROLES = ("human", "observation"), ("gpt", "function_call")


@dataclass(frozen=True)
class Trainer:
    """The format of a trainer: a function for each dataset that it trains on, and its files beside the rows."""

    rows: Mapping[str, Callable[[Any], Row]]
    files: Callable[[str], Mapping[str, Any]] = lambda _dataset: {}


def axolotl_pair(pair: Pair) -> Row:
    """`type: chat_template.default`: messages, and one message for each answer."""
    _refuse_inputs(pair.template_inputs, "axolotl")
    return {
        "messages": [_plain(m, "axolotl") for m in pair.prompt],
        "chosen": _plain(_answer(pair.chosen), "axolotl"),
        "rejected": _plain(_answer(pair.rejected), "axolotl"),
    }


def axolotl_label(label: Label) -> Row:
    """`type: chatml.prompt_pairs`, `llama3.prompt_pairs` or `user_defined.default`: texts."""
    _refuse_inputs(label.template_inputs, "axolotl")
    turns = [_plain(m, "axolotl") for m in label.prompt]
    roles = [turn["role"] for turn in turns]
    if roles not in (["user"], ["system", "user"]):
        raise _refused(f"axolotl reads one question for KTO, and the prompt has the turns {', '.join(roles)}")
    return {
        "system": turns[0]["content"] if len(turns) == 2 else "",
        "prompt": turns[-1]["content"],
        "completion": _plain(_answer(label.completion), "axolotl")["content"],
        "label": label.label,
    }


def llama_factory_pair(pair: Pair) -> Row:
    """`formatting: sharegpt`, `ranking: true`."""
    return {
        **_conversation(pair.prompt, pair.template_inputs),
        "chosen": _sharegpt(_answer(pair.chosen)),
        "rejected": _sharegpt(_answer(pair.rejected)),
    }


def llama_factory_label(label: Label) -> Row:
    """`formatting: sharegpt` with a kto_tag; the answer is the last turn."""
    row = _conversation(label.prompt, label.template_inputs)
    row["conversations"].append(_sharegpt(_answer(label.completion)))
    return {**row, "kto_tag": label.label}


def nemo_rl_pair(pair: Pair) -> Row:
    """PreferenceDataset: a context and two completions, of which rank 0 is preferred."""
    _refuse_inputs(pair.template_inputs, "NeMo RL")
    sides = [_plain(_answer(side), "NeMo RL") for side in (pair.chosen, pair.rejected)]
    return {
        "context": [_plain(m, "NeMo RL") for m in pair.prompt],
        "completions": [{"rank": rank, "completion": [side]} for rank, side in enumerate(sides)],
    }


def _dataset_info(dataset: str) -> Row:
    columns = {"messages": "conversations", "system": "system", "tools": "tools"}
    columns |= {"chosen": "chosen", "rejected": "rejected"} if dataset == "pairs" else {"kto_tag": "kto_tag"}
    ranking = {"ranking": True} if dataset == "pairs" else {}
    info = {"file_name": "rows.jsonl", "formatting": "sharegpt", **ranking, "columns": columns}
    return {"dataset_info.json": {f"prefpipe_{dataset}": info}}


TRAINERS = {
    "axolotl": Trainer({"pairs": axolotl_pair, "labels": axolotl_label}),
    "llama-factory": Trainer({"pairs": llama_factory_pair, "labels": llama_factory_label}, _dataset_info),
    "nemo-rl": Trainer({"pairs": nemo_rl_pair}),
}


def _refused(detail: str) -> RowFault:
    return RowFault("not_carried", detail)


def _answer(messages: Sequence[Message]) -> Message:
    if len(messages) != 1:
        raise _refused(f"the answer has {len(messages)} turns, and all of them would be trained on")
    return messages[0]


def _refuse_inputs(template_inputs: str | None, trainer: str) -> None:
    if template_inputs:
        raise _refused(f"{trainer} takes no {', '.join(json.loads(template_inputs))} from a row")


def _plain(message: Message, trainer: str) -> Row:
    """A message that has only role and content. Raises RowFault for any other."""
    turn = as_dict(message)
    others = [name for name in turn if name not in ("role", "content")]
    if others:
        raise _refused(f"{trainer} reads role and content of a message, and it has {', '.join(others)}")
    if turn["role"] not in _ROLES:
        raise _refused(f"{trainer} knows no turns of {turn['role']}")
    return turn


def _conversation(prompt: Sequence[Message], template_inputs: str | None) -> Row:
    """The turns of a prompt under the names of ShareGPT; system prompt and tools are columns of the row."""
    inputs = json.loads(template_inputs) if template_inputs else {}
    if others := [name for name in inputs if name != "tools"]:
        raise _refused(f"LLaMA-Factory takes no {', '.join(others)} from a row")
    tools = [tool.get("function", tool) for tool in inputs.get("tools", [])]
    has_system = bool(prompt) and prompt[0]["role"] == "system"
    turns = [_sharegpt(message) for message in prompt[has_system:]]
    for number, turn in enumerate(turns):
        if turn["from"] not in (_INPUT_ROLES, _OUTPUT_ROLES)[number % 2]:
            raise _refused(f"LLaMA-Factory skips rows whose turn {number + 1} is of {turn['from']}")
    if len(turns) % 2 == 0:
        raise _refused("LLaMA-Factory skips rows whose prompt does not end with a question or a tool's result")
    system = _plain(prompt[0], "LLaMA-Factory")["content"] if has_system else ""
    return {"conversations": turns, "system": system, "tools": json.dumps(tools, ensure_ascii=False) if tools else ""}


def _sharegpt(message: Message) -> Row:
    """A message as `from` and `value`. Tool calls become JSON of name and arguments, a list where there are several."""
    turn = as_dict(message)
    if any(turn.get(name) for name in REASONING):
        raise _refused("LLaMA-Factory has no field for the reasoning of an answer")
    calls = turn.get("tool_calls")
    others = [name for name in turn if name not in ("role", "content", "tool_calls", "name", "tool_call_id")]
    if others:
        raise _refused(f"LLaMA-Factory reads no {', '.join(others)} of a message")
    if calls and turn["content"]:
        raise _refused("LLaMA-Factory takes a turn of text or of tool calls, and this one is both")
    if calls:
        functions = [_function(call) for call in calls]
        value = json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)
        return {"from": "function_call", "value": value}
    names = {"user": "human", "assistant": "gpt", "tool": "observation", "function": "observation"}
    if turn["role"] not in names:
        raise _refused(f"LLaMA-Factory knows no turns of {turn['role']} behind the first")
    return {"from": names[turn["role"]], "value": turn["content"]}


def _function(call: Mapping[str, Any]) -> Row:
    """Name and arguments of a tool call. Arguments that are JSON text in the file become an object."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise _refused(f"the arguments of a tool call are no JSON: {arguments[:60]!r}") from error
    return {"name": function.get("name"), "arguments": arguments}
