"""A spelled control token becomes plain text in tokenizers of every kind, whatever they put around words."""

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, models

from prefpipe.errors import RowFault
from prefpipe.models.escape import MARK, encode_marked, mark, unmarked
from tests.models.cases import END, byte_level, finish, legacy, lower, pieces


@pytest.mark.parametrize("make", [legacy, lower, pieces, byte_level])
@pytest.mark.parametrize("text", [f"what does {END} mean?", END, f"{END}{END} x", f"a{END}b"])
def test_the_token_is_gone_and_its_letters_are_there(make: Callable[[], Tokenizer], text: str) -> None:
    """The template ends the turn with the same token, which stays."""
    tokenizer = make()
    (marked,), tokens = mark([text], [[END]])
    assert unmarked(marked, tokens) == text
    ids, _ = encode_marked(tokenizer, marked + END, tokens)
    assert ids.count(tokenizer.token_to_id(END)) == 1 == ids[-1:].count(tokenizer.token_to_id(END))
    assert "".join(tokenizer.decode(ids[:-1]).split()) == "".join(text.split())


@pytest.mark.parametrize("make", [legacy, lower, pieces, byte_level])
@pytest.mark.parametrize("text", [f"what does {END} mean?", END, f"{END}{END} x", f"a{END}b"])
def test_offsets_point_into_the_text_without_marks(make: Callable[[], Tokenizer], text: str) -> None:
    """In their order; the token that the template wrote stands for itself, each letter for one of its own."""
    tokenizer = make()
    (marked,), tokens = mark([text], [[END]])
    ids, offsets = encode_marked(tokenizer, f"<{marked}{END}", tokens)
    whole = f"<{text}{END}"
    assert offsets == sorted(offsets)
    assert offsets[-1] == (len(whole) - len(END), len(whole))
    for number, (start, end) in zip(ids, offsets, strict=True):
        letters = "".join(c for c in tokenizer.id_to_token(number).removeprefix("##") if c.isascii() and c.isalpha())
        assert letters.casefold() in whole[start:end].casefold()


def test_the_longest_token_is_marked_and_each_text_has_its_own() -> None:
    marked, tokens = mark(["a <x> <x><y>", "<x>"], [["<x>", "<x><y>"], []])
    assert tokens == ["<x><y>", "<x>"]
    assert marked == [f"a {MARK}1{MARK} {MARK}0{MARK}", "<x>"]


def test_a_token_that_cannot_be_written_is_a_fault() -> None:
    """A token of one character has no two halves; a tokenizer without its letters loses them."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("§", special=True)])
    for text, token in ((f"{MARK}0{MARK}", "§"),):
        with pytest.raises(RowFault, match="cannot write a control token"):
            encode_marked(tokenizer, text, [token])
    few = finish(Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")))
    with pytest.raises(RowFault, match="cannot write a control token"):
        encode_marked(few, f"a{MARK}0{MARK}", [END])
