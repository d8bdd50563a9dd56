"""Foreign files become our rows: nothing is lost without a reason, and every error says where."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.errors import DataError
from prefpipe.ids import content_id, ids_digest
from prefpipe.inputs.tokenised import Limits
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.encoding import Rules, encode, render
from prefpipe.schemas import Message, Pair
from tests.conftest import ROOT, Write
from tests.inputs.cases import read_completions, read_labels, read_pairs

EOS = 2  # <|im_end|>
OPENING = "{{ messages[0].content }}:{% if messages|length > 1 %}"
ANSWERS = st.text(alphabet="ab \n.é", min_size=1, max_size=8)


def pair(prompt: Any = "Name a bird.", chosen: Any = "An owl.", rejected: Any = "No.") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_standard_and_conversational_pairs_are_the_same(write: Write, chat: Chat) -> None:
    turns = {
        "prompt": [{"role": "user", "content": "Name a bird."}],
        "chosen": [{"role": "assistant", "content": "An owl."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    standard, _ = read_pairs(write(pair()), chat)
    conversational, _ = read_pairs(write(turns), chat)
    assert standard == conversational


def test_repeated_pairs_stay_and_are_counted(write: Write, chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, dropped = read_pairs(write(pair(), pair(prompt="Other?"), pair(), pair()), chat)
    assert (len(pairs), dropped) == (4, [])
    assert "2 of 4 pairs repeat an earlier one" in capsys.readouterr().err
    read_pairs(write(pair(), pair(prompt="Other?")), chat)
    assert capsys.readouterr().err == ""


def test_an_answer_is_tokenised_as_the_chosen_one_of_a_pair(write: Write, chat: Chat) -> None:
    """As prompt and completion, and as a conversation; a row that comes twice stays, a faulty one is in the ledger."""
    ((expected,), _) = read_pairs(write(pair()), chat)
    talk = {"messages": [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "An owl."}]}
    asked = {"messages": talk["messages"][:1]}
    plain, _ = read_completions(write({"prompt": "Name a bird.", "completion": "An owl."}, name="p.jsonl"), chat)
    path = write(talk, asked, talk, name="t.jsonl")
    found, dropped = read_completions(path, chat)
    assert found == [*plain, *plain]
    assert (found[0].prompt_token_ids, found[0].token_ids) == (expected.prompt_token_ids, expected.chosen_token_ids)
    assert found[0].completion_id == expected.chosen_completion_id
    assert [(row.id, row.reason) for row in dropped] == [(f"{path}, line 2", "bad_roles")]
    short, too_long = read_completions(path, chat, Limits(max_length=4))
    assert (short, [row.reason for row in too_long]) == ([], ["too_long", "bad_roles", "too_long"])
    with pytest.raises(DataError, match="a row of format 'preference', not 'completion'"):
        read_completions(write(pair(), name="pairs.jsonl"), chat)


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
@given(prompt=ANSWERS.filter(str.strip), chosen=ANSWERS.filter(str.strip), rejected=ANSWERS.filter(str.strip))
def test_a_pair_is_its_rendering_cut_in_two(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prompt: str, chosen: str, rejected: str
) -> None:
    """prompt + completion is a prefix of the whole rendering; EOS comes once, at the end; the prompt is shared."""
    if chosen == rejected:
        return
    chat = load_chat(tiny_model)
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
    """A template that opens the answer with <think> when generating: the rendered answers lack it. By default such a
    row is left out, with the letters that differ. Where that is allowed, 'P<think>' and 'Pa' share 'P' alone."""
    template = (
        "{{ messages[0].content }}{% if add_generation_prompt %}<think>{% else %}{{ messages[1].content }}{% endif %}"
        "<|im_end|>"
    )
    changed, path = replace(chat, template=template), write(pair("P", "abc", "abd"))
    rows, (fault,) = read_pairs(path, changed)
    assert (rows, fault.reason) == ([], "template_changes")
    assert "'<think><|im_end|>' where the answer's rendering has 'abc<|im_end|>'" in fault.detail
    ((row,), _) = read_pairs(path, changed, Limits(rules=Rules(template_changes="allow")))
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
    """It would end twice. By default such a row is left out, with its reason."""
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


def test_a_row_without_a_column_is_left_out_and_a_file_without_it_is_refused(write: Write, chat: Chat) -> None:
    rows, dropped = read_pairs(write(pair(), {"prompt": "Hi", "chosen": "a"}, {"chosen": "a", "rejected": "b"}), chat)
    assert (len(rows), [d.reason for d in dropped]) == (1, ["missing", "missing"])
    with pytest.raises(DataError, match="line 1: a column 'chosen' or 'rejected' is missing"):
        read_pairs(write({"prompt": "Hi", "chosen": "a"}), chat)
    with pytest.raises(DataError, match="line 1: a row of format 'completion', not 'preference'"):
        read_pairs(write({"prompt": "Hi", "completion": "a"}), chat)


def test_labels_have_the_ids_of_pairs_with_the_same_texts(write: Write, chat: Chat) -> None:
    (pair,), _ = read_pairs(write({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, name="pairs.jsonl"), chat)
    rows = [{"prompt": "Hi", "completion": text, "label": text == "Yes"} for text in ("Yes", "No")]
    (good, bad), dropped = read_labels(write(*rows), chat)
    assert (good.label, bad.label, dropped) == (True, False, [])
    assert (good.token_ids, bad.token_ids) == (pair.chosen_token_ids, pair.rejected_token_ids)
    assert good.prompt_token_ids == pair.prompt_token_ids
    assert (good.completion_id, good.ids_digest) == (pair.chosen_completion_id, pair.chosen_ids_digest)


def test_faulty_and_repeated_labels_go_to_the_ledger(write: Write, chat: Chat) -> None:
    good = {"prompt": "Hi", "completion": "Yes", "label": True}
    others = [
        {**good, "label": False},
        good,
        {**good, "completion": []},
        {**good, "label": "?"},
        {**good, "label": None},
    ]
    labels, dropped = read_labels(write(good, *others), chat)
    assert [row.label for row in labels] == [True]
    assert [row.reason for row in dropped] == ["conflicting_label", "duplicate", "empty", "bad_label", "null"]


def test_the_shipped_pairs_load_completely(chat: Chat) -> None:
    path = ROOT / "data" / "pairs.jsonl"
    rows, dropped = read_pairs(path, chat)
    assert not dropped
    assert len(rows) == len(path.read_text().splitlines()) == len({r.pair_id for r in rows})
    assert all(_ends_once(row) for row in rows)


def _ends_once(row: Pair) -> bool:
    return all(ids.index(EOS) == len(ids) - 1 for ids in (row.chosen_token_ids, row.rejected_token_ids))
