"""Chat templates and tokens: the same as transformers', and every faulty prompt has a reason."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.errors import DataError, MissingInputError, RowFault
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import Rules, encode, encode_prompt, render
from prefpipe.models.notices import notices
from prefpipe.schemas import Message
from tests.models.cases import USER
from tests.tiny import SPECIAL

EMBEDDED = "embedded:smollm2-135m-instruct"


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_decode_gives_the_text_back(tiny_model: Path, text: str) -> None:
    """A byte tokenizer loses nothing; the end-of-sequence token is no text."""
    chat = load_chat(tiny_model)
    if not any(token in text for token in SPECIAL):
        assert chat.decode([*encode(chat, text), 2]) == text


def test_control_tokens_that_are_no_special_tokens_count_when_the_template_uses_them(copy: Path) -> None:
    """`<turn>` is an ordinary added token; the template makes it a control token."""
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [{"id": 259, "content": "<turn>", **flags}, {"id": 260, "content": "<word>", **flags}]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    (copy / "chat_template.jinja").write_text("{% for m in messages %}<turn>{{ m.content }}{% endfor %}")
    assert set(load_chat(copy).control_tokens) == {*SPECIAL, "<turn>"}


def test_load_names_what_is_missing(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"chat template nowhere\.jinja does not exist"):
        load_chat(copy, "nowhere.jinja")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(MissingInputError, match="has no chat template") as caught:
        load_chat(copy)
    assert "--chat-template" in caught.value.hint
    (copy / "tokenizer.json").unlink()
    with pytest.raises(MissingInputError, match=r"has no tokenizer\.json") as caught:
        load_chat(copy)
    assert "save_pretrained" in caught.value.hint


def test_every_end_of_sequence_id_counts(copy: Path) -> None:
    """The tokenizer says 2; the model config says 2; the generation config may list more."""
    assert load_chat(copy).eos_token_ids == {2}
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert load_chat(copy).eos_token_ids == {0, 2}
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_chat(copy).eos_token_ids == {2, 7}


def test_a_model_without_an_end_is_an_error(copy: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        values = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({k: v for k, v in values.items() if not k.startswith("eos_token")}))
    with pytest.raises(DataError, match="names no end-of-sequence token") as caught:
        load_chat(copy)
    assert "generation_config.json" in caught.value.hint


def test_named_tokens_may_be_objects(copy: Path) -> None:
    file = copy / "tokenizer_config.json"
    token = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    values = {**json.loads(file.read_text()), "eos_token": token}
    file.write_text(json.dumps(values))
    assert load_chat(copy).named_tokens["eos_token"] == "<|im_end|>"


def test_digests_change_with_the_content_only(copy: Path, chat: Chat) -> None:
    assert load_chat(copy).digests == chat.digests
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }} other")
    changed = load_chat(copy).digests
    assert changed["chat_template"] != chat.digests["chat_template"]
    assert changed["tokenizer"] == chat.digests["tokenizer"]


def test_a_template_with_a_date_prints_the_given_day_and_is_identified_by_it(copy: Path) -> None:
    dated = "Today: {{ strftime_now('%d %B %Y') }} " + (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(dated)
    first, second = (load_chat(copy, date=day) for day in ("2024-02-29", "2024-03-01"))
    assert render(first, [USER], add_generation_prompt=False).startswith("Today: 29 February 2024")
    assert first.digests["template_date"] == "2024-02-29" != second.digests["template_date"]
    assert any("prints a date, 2024-02-29" in notice for notice in notices(first))
    assert load_chat(copy).digests["template_date"] not in ("today", "")


def test_a_template_without_a_date_is_the_same_on_every_day(chat: Chat, tiny_model: Path) -> None:
    assert load_chat(tiny_model, date="2024-02-29").digests == chat.digests
    assert "template_date" not in chat.digests


def test_plain_text_mode_is_prompt_answer_and_end(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(MissingInputError, match="has no chat template"):
        load_chat(copy)
    plain = load_chat(copy, "none")
    assert encode_prompt(plain, [USER], max_tokens=99, rules=Rules("drop")) == encode(plain, "Name a bird.")
    turns = [USER, Message(role="assistant", content=" The owl.")]
    ids = encode(plain, render(plain, turns, add_generation_prompt=False))
    assert ids == [*encode(plain, "Name a bird. The owl."), 2]
    with pytest.raises(RowFault, match="takes one prompt and one answer"):
        encode_prompt(plain, [Message(role="system", content="x"), USER], max_tokens=99, rules=Rules("drop"))


def test_plain_text_begins_with_the_tokenizers_own_first_token(copy: Path) -> None:
    """Base models expect their opening token; a tokenizer that adds one says so in its post-processor."""
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    path.write_text(json.dumps(tokenizer))
    plain = load_chat(copy, "none")
    assert encode_prompt(plain, [USER], max_tokens=99, rules=Rules("drop")) == [0, *encode(plain, "Name a bird.")]


def test_decoding_many_is_decoding_each(chat: Chat) -> None:
    many = [[*encode(chat, text), 2] for text in ("one", "zwei é", "")]
    assert chat.decode_all(many) == [chat.decode(ids) for ids in many] == ["one", "zwei é", ""]


def test_plain_text_that_begins_with_the_first_token_gets_no_second_one(copy: Path) -> None:
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    path.write_text(json.dumps(tokenizer))
    plain = load_chat(copy, "none")
    messages = [Message(role="user", content="<|endoftext|>hi")]
    assert encode_prompt(plain, messages, max_tokens=99, rules=Rules("allow")) == [0, *encode(plain, "hi")]
    assert encode_prompt(plain, messages, max_tokens=99, rules=Rules("escape")).count(0) == 1


def test_plain_text_ends_with_the_tokenizers_own_last_token(copy: Path) -> None:
    """Other ids that end a completion, such as a smaller one of the generation config, are not written."""
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    plain = load_chat(copy, "none")
    turns = [USER, Message(role="assistant", content="x")]
    assert encode(plain, render(plain, turns, add_generation_prompt=False))[-1] == 2


def test_a_classifier_needs_no_end(copy: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        values = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({k: v for k, v in values.items() if not k.startswith("eos_token")}))
    assert load_chat(copy, generates=False).eos_token_ids == frozenset()
