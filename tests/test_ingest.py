"""Foreign files become our rows: nothing is lost without a reason, and every error says where."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe import chat as chats
from prefpipe.chat import Chat, encode, render
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.ids import content_id, ids_digest
from prefpipe.ingest import read_labels, read_pairs, read_prompts
from prefpipe.schemas import Message, Pair
from tests.conftest import ROOT

Write = Callable[..., Path]
EOS = 2  # <|im_end|>
OPENING = "{{ messages[0].content }}:{% if messages|length > 1 %}"
ANSWERS = st.text(alphabet="ab \n.é", min_size=1, max_size=8)


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return chats.load(tiny_model)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A JSONL file of rows; a text is written as it is."""

    def call(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return path

    return call


def pair(prompt: Any = "Name a bird.", chosen: Any = "An owl.", rejected: Any = "No.") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_messages_and_plain_text_are_the_same_prompt(write: Write) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    path = write({"messages": messages}, {"prompt": "Hi"}, {"prompt": messages}, {"messages": None, "prompt": "Hi"})
    prompts, dropped = read_prompts(path, "train", 0)
    assert [p.messages for p in prompts] == [messages]
    assert prompts[0].prompt_id == content_id(messages, None)
    assert [(d.reason, d.detail) for d in dropped] == [
        ("duplicate", f"{path}, line {n} repeats an earlier prompt") for n in (2, 3, 4)
    ]
    assert {d.id for d in dropped} == {prompts[0].prompt_id}


def test_a_prompt_keeps_all_its_columns(write: Write) -> None:
    row = {"prompt": "Hi", "answer": "hi", "source": "us", "level": 3, "tags": ["é"], "prompt_id": "foreign"}
    ((prompt,), _) = read_prompts(write(row), "train", 0)
    assert (prompt.answer, prompt.source, prompt.split) == ("hi", "us", "train")
    assert json.loads(prompt.meta) == {"level": 3, "tags": ["é"]}
    assert prompt.prompt_id == content_id(prompt.messages, "hi") != content_id(prompt.messages, None)


def test_parquet_and_jsonl_give_the_same_prompts(write: Write, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": c}], "answer": c, "split": "train"} for c in "abc"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_prompts(tmp_path / "rows.parquet", "train", 0) == read_prompts(write(*rows), "train", 0)


def test_splits_and_limit(write: Write) -> None:
    """Rows 0, 2, 4 are held out; a row without a split belongs to train."""
    rows = [{"prompt": str(i), **({"split": "heldout"} if i % 2 == 0 else {})} for i in range(6)]
    path = write(*rows)

    def texts(split: str, limit: int) -> list[str]:
        return [p.messages[0]["content"] for p in read_prompts(path, split, limit)[0]]

    assert texts("train", 0) == ["1", "3", "5"]
    assert texts("heldout", 0) == ["0", "2", "4"]
    assert texts("all", 0) == list("012345")
    assert texts("heldout", 2) == ["0", "2"]
    assert texts("all", 99) == list("012345")


def test_a_duplicate_counts_within_its_split_only(write: Write) -> None:
    path = write({"prompt": "a"}, {"prompt": "a", "split": "heldout"}, {"prompt": "a"})
    prompts, dropped = read_prompts(path, "train", 0)
    assert (len(prompts), len(dropped)) == (1, 1)
    assert "line 3" in dropped[0].detail


def test_a_split_that_is_not_there_lists_those_that_are(write: Write) -> None:
    with pytest.raises(DataError, match=r"no prompt with split 'test' \(splits there: heldout, train\)") as caught:
        read_prompts(write({"prompt": "a"}, {"prompt": "b", "split": "heldout"}), "test", 0)
    assert "--split" in caught.value.hint
    with pytest.raises(DataError, match="splits there: none"):
        read_prompts(write(), "train", 0)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: not a JSON object"),
        ({"text": "x"}, r"line 2: field 'prompt' is missing \(fields: text\)"),
        ({"prompt": 3}, "line 2: field 'prompt' is neither text nor a list of messages"),
        ({"messages": [{"role": "user"}]}, "line 2: field 'messages' is neither text nor"),
        ({"messages": [{"role": "user", "content": None}]}, "line 2: field 'messages' is neither"),
        ({"prompt": "x", "answer": 3}, "line 2: field 'answer' is int, not text"),
    ],
)
def test_an_error_names_file_line_and_field(write: Write, row: Any, error: str) -> None:
    path = write({"prompt": "fine"}, row)
    with pytest.raises(DataError, match=f"^{path}, {error}") as caught:
        read_prompts(path, "train", 0)
    assert caught.value.hint


def test_text_that_is_no_unicode_is_told_with_its_place(write: Write, tmp_path: Path) -> None:
    r"""Half of a surrogate pair ("\ud800") is legal JSON but can be neither hashed nor stored as UTF-8."""
    path = write({"prompt": "fine"}, r'{"prompt": "half \ud800"}')
    prompts, dropped = read_prompts(path, "train", 0)
    assert len(prompts) == 1
    assert [(d.id, d.reason) for d in dropped] == [(f"{path}, line 2", "not_unicode")]
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl, line 1"):
        read_prompts(latin, "train", 0)


def test_an_error_of_a_parquet_row_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": pa.array(["a", None])}), path)
    with pytest.raises(DataError, match=f"{path}, row 1: field 'prompt' is missing"):
        read_prompts(path, "train", 0)


def test_blank_lines_do_not_count_but_keep_line_numbers_right(write: Write) -> None:
    path = write({"prompt": "a"}, "", "  ", {"answer": "b"})
    with pytest.raises(DataError, match="line 4"):
        read_prompts(path, "train", 0)


def test_files_that_are_not_there_or_of_another_kind(write: Write, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nowhere\.jsonl does not exist"):
        read_prompts(tmp_path / "nowhere.jsonl", "train", 0)
    with pytest.raises(UsageError, match=r"unknown kind of file '\.csv'"):
        read_prompts(write(name="rows.csv"), "train", 0)
    with pytest.raises(DataError, match="cannot read"):
        read_prompts(write("no parquet", name="rows.parquet"), "train", 0)


def test_standard_and_conversational_pairs_are_the_same(write: Write, chat: Chat) -> None:
    turns = {
        "prompt": [{"role": "user", "content": "Name a bird."}],
        "chosen": [{"role": "assistant", "content": "An owl."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    standard, _ = read_pairs(write(pair()), chat)
    conversational, _ = read_pairs(write(turns), chat)
    assert standard == conversational


def test_the_ids_of_a_pair_by_hand(write: Write, chat: Chat) -> None:
    """The prompt ends with the generation prompt; the completion is text + <|im_end|>; the newline after it is none."""
    ((row,), dropped) = read_pairs(write(pair()), chat)
    assert not dropped
    assert row.prompt_token_ids == encode(chat, "<|im_start|>user\nName a bird.<|im_end|>\n<|im_start|>assistant\n")
    assert row.chosen_token_ids == encode(chat, "An owl.<|im_end|>")
    assert row.rejected_token_ids == encode(chat, "No.<|im_end|>")
    assert row.chosen_ids_digest == ids_digest(row.prompt_token_ids, row.chosen_token_ids)
    assert row.rejected_ids_digest == ids_digest(row.prompt_token_ids, row.rejected_token_ids)
    assert row.pair_id == content_id(row.chosen_completion_id, row.rejected_completion_id)
    assert (row.weight, row.reference, row.chosen_reward, row.ref_chosen_logps) == (1.0, None, None, None)


@settings(max_examples=60, deadline=None)
@given(prompt=ANSWERS.filter(str.strip), chosen=ANSWERS, rejected=ANSWERS)
def test_a_pair_is_its_rendering_cut_in_two(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prompt: str, chosen: str, rejected: str
) -> None:
    """prompt + completion is a prefix of the whole rendering; EOS comes once, at the end; the prompt is shared."""
    if chosen == rejected:
        return
    chat = chats.load(tiny_model)
    path = tmp_path_factory.mktemp("pairs") / "p.jsonl"
    path.write_text(json.dumps(pair(prompt, chosen, rejected)))
    ((row,), _) = read_pairs(path, chat)
    for answer, ids in ((chosen, row.chosen_token_ids), (rejected, row.rejected_token_ids)):
        turns = [Message(role="user", content=prompt), Message(role="assistant", content=answer)]
        whole = encode(chat, render(chat, turns, add_generation_prompt=False))
        assert whole[: len(row.prompt_token_ids) + len(ids)] == [*row.prompt_token_ids, *ids]
        assert ids.index(EOS) == len(ids) - 1
        assert chat.decode(ids) == answer


def test_the_prompt_is_what_all_three_renderings_share(write: Write, chat: Chat) -> None:
    """A template that opens the answer with <think> when generating: the rendered answers lack it, so it is no prompt.

    'P<think>' and 'Pa' share 'P' alone; the answers come after it.
    """
    template = (
        "{{ messages[0].content }}{% if add_generation_prompt %}<think>{% else %}{{ messages[1].content }}{% endif %}"
        "<|im_end|>"
    )
    ((row,), _) = read_pairs(write(pair("P", "abc", "abd")), replace(chat, template=template))
    assert row.prompt_token_ids == encode(chat, "P")
    assert row.chosen_token_ids == encode(chat, "abc<|im_end|>")
    assert row.rejected_token_ids == encode(chat, "abd<|im_end|>")


def test_what_both_answers_share_stays_in_both(write: Write, chat: Chat) -> None:
    """The common prefix ends with the prompt alone, not inside the answers."""
    ((row,), _) = read_pairs(write(pair(chosen="The owl.", rejected="The elk.")), chat)
    assert chat.decode(row.chosen_token_ids) == "The owl."
    assert chat.decode(row.rejected_token_ids) == "The elk."


@pytest.mark.parametrize("ending", ["<|im_end|>\n", "<|im_end|><|im_end|>", "<|im_end|><|endoftext|>"])
def test_one_end_whatever_the_template_adds(write: Write, chat: Chat, ending: str) -> None:
    """The docstring's promise: "with its end-of-sequence token exactly once and nothing after it"."""
    template = OPENING + "{{ messages[1].content }}" + ending + "{% endif %}"
    changed = replace(chat, template=template, eos_token_ids=frozenset({0, EOS}))
    ((row,), _) = read_pairs(write(pair("P", "abc", "abd")), changed)
    for ids, answer in ((row.chosen_token_ids, "abc"), (row.rejected_token_ids, "abd")):
        assert ids[:-1] == encode(chat, answer)
        assert ids[-1] in changed.eos_token_ids


def test_no_end_where_the_template_has_none(write: Write, chat: Chat) -> None:
    """An end that the template does not write would be a token that the model never sees there."""
    changed = replace(chat, template=OPENING + "{{ messages[1].content }}{% endif %}")
    ((row,), _) = read_pairs(write(pair("P", "abc", "abd")), changed)
    assert row.chosen_token_ids == encode(chat, "abc")


def test_an_answer_that_spells_a_control_token_goes_to_the_ledger(write: Write, chat: Chat) -> None:
    """It would end twice. DESIGN: control tokens are dropped by default, with their reason."""
    rows, dropped = read_pairs(write(pair(), pair(chosen="An <|im_end|> owl.")), chat)
    assert len(rows) == 1
    assert [(d.id.rpartition(", ")[2], d.reason) for d in dropped] == [("line 2", "control_tokens")]


def test_faulty_pairs_go_to_the_ledger_with_file_and_line(write: Write, chat: Chat) -> None:
    path = write(
        pair(),
        pair(chosen="No."),
        pair(prompt=" "),
        pair(prompt=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]),
        pair(chosen=[]),
    )
    rows, dropped = read_pairs(path, chat)
    assert len(rows) == 1
    assert [(d.id, d.reason) for d in dropped] == [
        (f"{path}, line 2", "identical"),
        (f"{path}, line 3", "empty"),
        (f"{path}, line 4", "bad_roles"),
        (f"{path}, line 5", "empty"),
    ]


def test_answers_with_the_same_tokens_are_identical(write: Write, chat: Chat) -> None:
    """The template trims white space: the texts differ, what the model sees does not."""
    template = OPENING + "{{ messages[1].content | trim }}<|im_end|>{% endif %}"
    changed = replace(chat, template=template)
    rows, dropped = read_pairs(write(pair(), pair(chosen="Yes.", rejected="Yes. ")), changed)
    assert len(rows) == 1
    assert [d.reason for d in dropped] == ["identical"]


def test_chosen_that_repeats_the_prompt_never_doubles_it(write: Write, chat: Chat) -> None:
    """A common form of preference files (UltraFeedback): `prompt` is text, `chosen` is the whole conversation.

    The row is understood or goes to the ledger; a completion that holds the prompt once more would be trained on.
    """
    user = {"role": "user", "content": "Name a bird."}
    whole = pair(
        chosen=[user, {"role": "assistant", "content": "An owl."}],
        rejected=[user, {"role": "assistant", "content": "No."}],
    )
    plain = pair(chosen="A tit.")
    rows, dropped = read_pairs(write(plain, whole), chat)
    assert len(rows) + len(dropped) == 2
    assert all("Name a bird" not in chat.decode(row.chosen_token_ids) for row in rows)


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_a_missing_column_of_a_pair_is_named(write: Write, chat: Chat, name: str) -> None:
    path = write(pair(), {k: v for k, v in pair().items() if k != name})
    with pytest.raises(DataError, match=f"{path}, line 2: field '{name}' is missing"):
        read_pairs(path, chat)
    with pytest.raises(DataError, match=f"line 1: field '{name}' is neither text nor"):
        read_pairs(write({**pair(), name: 3}), chat)


def test_no_usable_pair_is_an_error(write: Write, chat: Chat) -> None:
    path = write(pair(chosen="No."))
    with pytest.raises(DataError, match=rf"{path} has no usable pair \(1 rows dropped\)"):
        read_pairs(path, chat)


def test_labels_have_the_ids_of_pairs_with_the_same_texts(write: Write, chat: Chat) -> None:
    (pair,), _ = read_pairs(write({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, name="pairs.jsonl"), chat)
    rows = [{"prompt": "Hi", "completion": text, "label": text == "Yes"} for text in ("Yes", "No")]
    (good, bad), dropped = read_labels(write(*rows), chat)
    assert (good.label, bad.label, dropped) == (True, False, [])
    assert (good.token_ids, bad.token_ids) == (pair.chosen_token_ids, pair.rejected_token_ids)
    assert good.prompt_token_ids == pair.prompt_token_ids
    assert (good.completion_id, good.ids_digest) == (pair.chosen_completion_id, pair.chosen_ids_digest)


@pytest.mark.parametrize("label", ["yes", 1, None])
def test_a_label_is_true_or_false(write: Write, chat: Chat, label: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: field 'label'"):
        read_labels(write({"prompt": "Hi", "completion": "Yes", "label": label}), chat)


def test_faulty_and_repeated_labels_go_to_the_ledger(write: Write, chat: Chat) -> None:
    good = {"prompt": "Hi", "completion": "Yes", "label": True}
    labels, dropped = read_labels(write(good, {**good, "label": False}, {**good, "completion": []}), chat)
    assert [row.label for row in labels] == [True]
    assert [row.reason for row in dropped] == ["duplicate", "empty"]
    with pytest.raises(DataError, match="no usable label"):
        read_labels(write({**good, "completion": []}), chat)


def test_the_shipped_prompts_load_completely() -> None:
    path = ROOT / "data" / "prompts.jsonl"
    lines = path.read_text().splitlines()
    prompts, dropped = read_prompts(path, "all", 0)
    assert not dropped
    assert len(prompts) == len(lines)
    assert {p.split for p in prompts} == {"train", "heldout"}
    assert all(p.answer and p.answer in p.messages[-1]["content"] for p in prompts)


def test_the_shipped_pairs_load_completely(chat: Chat) -> None:
    path = ROOT / "data" / "pairs.jsonl"
    rows, dropped = read_pairs(path, chat)
    assert not dropped
    assert len(rows) == len(path.read_text().splitlines()) == len({r.pair_id for r in rows})
    assert all(_ends_once(row) for row in rows)


def _ends_once(row: Pair) -> bool:
    return all(ids.index(EOS) == len(ids) - 1 for ids in (row.chosen_token_ids, row.rejected_token_ids))
