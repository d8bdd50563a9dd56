"""Models of the hub by their metadata: token ids are those of transformers, or one refusal says what would help."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from prefpipe.errors import PrefpipeError, RowFault
from prefpipe.inputs import formats, tokenised
from prefpipe.inputs.tokenised import Limits
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import Rules, encode_prompt
from prefpipe.schemas import Message
from tests.zoo import cases

LARGE = 600_000  # bytes of a compressed tokenizer.json that takes seconds to load
pytestmark = pytest.mark.skipif(not cases.CORPUS.is_dir(), reason="the corpus of models is not here")


def say(role: str, content: str) -> Message:
    return Message(role=role, content=content)


ASK = say("user", "What is the capital of France?")
CONVERSATIONS: dict[str, tuple[list[Message], str]] = {
    "one turn": ([ASK], "The capital of France is Paris."),
    "system": ([say("system", "You are a terse geographer."), ASK], "Paris."),
    "several turns": ([ASK, say("assistant", "Paris."), say("user", "And of Italy?")], "Rome, of course."),
    "white space": ([say("user", "  Indent this,\n\nplease. ")], "\n  two spaces\n\nbefore, two after  "),
    "not ASCII": ([say("user", "Traduis « été » 🙂")], "夏天 — лето — صيف 👩‍🔬 naïve é"),
    "thoughts": ([say("user", "What is 2 + 2?")], "<think>\nTwo and two make four.\n</think>\n\nIt is 4."),
}


def parameters() -> list[Any]:
    """The models of the corpus; those that take seconds are marked slow."""
    files = {name: cases.CORPUS / name / "tokenizer.json.xz" for name in cases.names()}
    slow = {name for name, file in files.items() if file.is_file() and file.stat().st_size > LARGE}
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in files]


@pytest.mark.parametrize("name", parameters())
@pytest.mark.filterwarnings("default")
def test_token_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = cases.stand_in(name, tmp_path / "model")
    oracle = transformers_tokenizer(directory)
    chat = loaded(directory, "model" if oracle is None or oracle.chat_template else "none")
    if oracle is None:
        assert isinstance(chat, PrefpipeError), "what transformers refuses is loaded"
        assert chat.hint
        return
    assert isinstance(chat, Chat), f"transformers loads what is refused: {chat.message}"
    assert chat.eos_token_ids >= ends(directory, oracle)
    named = oracle.special_tokens_map
    assert {key: value for key, value in chat.named_tokens.items() if key in named} == named
    for messages, answer in CONVERSATIONS.values():
        check_conversation(chat, oracle, messages, answer)
    check_escaped(chat)


def loaded(directory: Path, chat_template: str) -> Chat | PrefpipeError:
    """What the project makes of a directory: a chat or a refusal."""
    try:
        return load_chat(directory, chat_template)
    except PrefpipeError as error:
        return error


def transformers_tokenizer(directory: Path) -> Any:
    """What transformers makes of a directory; None where it needs code of the model."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        return None
    finally:
        logging.set_verbosity(before)


def ends(directory: Path, oracle: Any) -> set[int]:
    """The ids at which transformers stops to generate, and that of the tokenizer."""
    try:
        value = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    except OSError:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        value = GenerationConfig.from_model_config(config).eos_token_id
    return {*(value if isinstance(value, list) else [value]), oracle.eos_token_id} - {None}


def ids_of(oracle: Any, messages: list[Message], *, prompt: bool) -> list[int]:
    """Token ids of a conversation in transformers; plain text for a model without a template."""
    if oracle.chat_template:
        return oracle.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
    ids = oracle("".join(m["content"] for m in messages)).input_ids
    return ids if prompt else [*ids, oracle.eos_token_id]


def check_conversation(chat: Chat, oracle: Any, messages: list[Message], answer: str) -> None:
    """Prompt ids as in transformers; the answer starts where its rendering leaves the prompt, and ends at its end."""
    try:
        ours = encode_prompt(chat, messages, max_tokens=1 << 20, rules=Rules("allow", "allow"))
    except RowFault as fault:
        if fault.reason != "template_refused":
            raise
        refused_by_transformers(chat, oracle, messages)
        return
    prompt = ids_of(oracle, messages, prompt=True)
    assert ours == prompt
    assert oracle.bos_token_id is None or prompt[:2] != [oracle.bos_token_id] * 2
    turns = [*messages, say("assistant", answer)]
    whole = ids_of(oracle, turns, prompt=False)
    row = formats.parse({"prompt": messages, "completion": turns[-1:]}, "completion")
    found = tokenised.tokenise(row, chat, Limits(rules=Rules("allow", "allow")))
    shared = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    assert found.prompt_ids == prompt[:shared]
    (ids,) = found.token_ids
    assert ids == whole[shared:][: len(ids)]
    rest = whole[shared + len(ids) :]
    assert sum(i in chat.eos_token_ids for i in ids) <= 1
    if any(i in chat.eos_token_ids for i in whole[shared:]):
        assert ids[-1] in chat.eos_token_ids
    else:
        assert rest == []


def refused_by_transformers(chat: Chat, oracle: Any, messages: list[Message]) -> None:
    """transformers raises for these messages too; plain text takes one turn."""
    if not oracle.chat_template:
        assert len(messages) > 1
        return
    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever the template raises)
        oracle.apply_chat_template(messages, add_generation_prompt=True)


def check_escaped(chat: Chat) -> None:
    """Every control token that a prompt spells: dropped by default, no control token when it is escaped."""
    for token in chat.control_tokens[:3]:
        messages = [say("user", f"What does {token} mean?")]
        with pytest.raises(RowFault, match="control_tokens"):
            encode_prompt(chat, messages, max_tokens=1 << 20, rules=Rules("drop"))
        ids = encode_prompt(chat, messages, max_tokens=1 << 20, rules=Rules("escape"))
        plain = encode_prompt(chat, [say("user", "What does it mean?")], max_tokens=1 << 20, rules=Rules("drop"))
        number = chat.tokenizer.token_to_id(token)
        assert ids.count(number) == plain.count(number)
