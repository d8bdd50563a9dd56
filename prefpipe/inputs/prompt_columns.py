"""The prompt of a foreign row, from whichever of its columns hold it, its system message and the turns before it."""

from collections.abc import Iterable

from prefpipe.errors import RowFault
from prefpipe.inputs.messages import Row, listed, messages, text
from prefpipe.schemas import Message, Messages

PROMPTS = ("prompt", "instruction", "input", "question", "messages", "conversations")
SYSTEMS = ("system_prompt", "system")


def prompt_of(row: Row) -> Messages:
    """The messages of a prompt, from whichever columns hold it. Raises RowFault where none does."""
    name = first(row, PROMPTS)
    if name is None:
        raise RowFault("missing", f"no field holds the prompt (fields: {listed(row)})")
    if name == "instruction" and row.get("input") not in (None, ""):
        prompt = [Message(role="user", content=f"{text(row[name], name)}\n{text(row['input'], 'input')}")]
    else:
        prompt = messages(row[name], name, "user")
    return behind_system(row, prompt)


def behind_system(row: Row, prompt: Messages) -> Messages:
    """A prompt behind the system message and the earlier turns that its row has in columns of their own. Raises
    RowFault where the prompt begins with another system message."""
    prompt = history(row) + prompt
    system = first(row, SYSTEMS)
    said = text(row[system], system) if system else ""
    if not said.strip() or not prompt:
        return prompt
    if prompt[0]["role"] != "system":
        return [Message(role="system", content=said), *prompt]
    if prompt[0]["content"].strip() != said.strip():
        raise RowFault("bad_roles", f"the prompt begins with another system message than field '{system}' has")
    return prompt


def history(row: Row) -> Messages:
    """Earlier turns, as messages or as pairs of question and answer, which some files keep in a column of their own."""
    rounds = row.get("history") or []
    if isinstance(rounds, list) and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in rounds):
        return messages(rounds, "history", "user")
    if not isinstance(rounds, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in rounds):
        return []
    roles = ("user", "assistant")
    return [
        Message(role=role, content=text(said, "history"))
        for pair in rounds
        for role, said in zip(roles, pair, strict=True)
    ]


def first(row: Row, names: Iterable[str]) -> str | None:
    """The first of these columns with a value in this row; None where there is none."""
    return next((n for n in names if row.get(n) is not None), None)
