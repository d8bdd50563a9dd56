"""Control tokens that a text spells, tokenised as plain text."""

import re
from collections.abc import Sequence
from itertools import accumulate

from tokenizers import Tokenizer

from prefpipe.errors import RowFault

Encoded = tuple[list[int], list[tuple[int, int]]]  # token ids, and the span of characters of each
MARK = "\ue0ff"  # a private character, which no template contains; a text that contains it is refused


def mark(texts: Sequence[str], spelled: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """The texts with a mark and a number in place of every control token that they spell, which survive the template;
    and the tokens by their numbers. `spelled` are the control tokens of each text.

    Raises RowFault when a text already contains the mark.
    """
    if any(MARK in text for text in texts):
        raise RowFault("control_tokens", "the text holds the private character that marks control tokens")
    tokens = sorted({token for each in spelled for token in each}, key=lambda token: (-len(token), token))
    numbers = {token: number for number, token in enumerate(tokens)}
    marked: list[str] = []
    for text, own in zip(texts, spelled, strict=True):
        pattern = "|".join(re.escape(token) for token in tokens if token in own)
        marked.append(re.sub(pattern, lambda match: f"{MARK}{numbers[match[0]]}{MARK}", text) if pattern else text)
    return marked, tokens


def unmarked(marked_text: str, tokens: Sequence[str]) -> str:
    """The text with its control tokens in place of their marks."""
    pieces = marked_text.split(MARK)
    return "".join(tokens[int(piece)] if place % 2 else piece for place, piece in enumerate(pieces))


def encode_marked(tokenizer: Tokenizer, marked_text: str, tokens: Sequence[str]) -> Encoded:
    """Token ids of a rendered text in which marks with numbers stand for `tokens`: none of those becomes one id; and
    the characters of the text without marks that every id stands for.

    Most tokenizers join pieces without a change: then the text is cut inside each token. Others add a space in front of
    every text, or join neighbours: there the whole text is encoded with a character inside each token that shares its
    ids with no neighbour, and those ids are taken out. Raises RowFault where neither gives the text back.
    """
    pieces = [
        (tokens[int(piece)], True) if place % 2 else (piece, False)
        for place, piece in enumerate(marked_text.split(MARK))
    ]
    text = "".join(piece for piece, _ in pieces)
    control = {tokenizer.token_to_id(token) for token in tokens}
    of_template = sum(i in control for piece, is_token in pieces if not is_token for i in _encode(tokenizer, piece)[0])
    for encoded, gives_text in (
        (_in_pieces(tokenizer, pieces), lambda ids: tokenizer.decode(ids, skip_special_tokens=False) == text),
        (_without_separators(tokenizer, pieces), lambda ids: _same_text(tokenizer, ids, _encode(tokenizer, text)[0])),
    ):
        if gives_text(encoded[0]) and sum(i in control for i in encoded[0]) <= of_template:
            return encoded
    raise RowFault("control_tokens", "this tokenizer cannot write a control token as plain text")


def _in_pieces(tokenizer: Tokenizer, pieces: Sequence[tuple[str, bool]]) -> Encoded:
    halves = [half for piece, is_token in pieces for half in ((piece[:1], piece[1:]) if is_token else (piece,))]
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    begin = 0
    for half in halves:
        of_half, places = _encode(tokenizer, half)
        ids += of_half
        offsets += [(begin + start, begin + end) for start, end in places]
        begin += len(half)
    return ids, offsets


def _without_separators(tokenizer: Tokenizer, pieces: Sequence[tuple[str, bool]]) -> Encoded:
    """The ids of the text with a separator after the first character of each token, without those of the separators."""
    text = "".join(f"{piece[:1]}{MARK}{piece[1:]}" if is_token else piece for piece, is_token in pieces)
    places = list(accumulate((character != MARK for character in text), initial=0))
    kept = [
        (i, offset) for i, offset in zip(*_encode(tokenizer, text), strict=True) if MARK not in text[slice(*offset)]
    ]
    return [i for i, _ in kept], [(places[start], places[end]) for _, (start, end) in kept]


def _same_text(tokenizer: Tokenizer, ids: Sequence[int], others: Sequence[int]) -> bool:
    """Whether ids decode to the same letters, except for white space and case that the tokenizer itself changes."""
    one, two = tokenizer.decode_batch([list(ids), list(others)], skip_special_tokens=False)
    return "".join(one.split()).casefold() == "".join(two.split()).casefold()


def _encode(tokenizer: Tokenizer, text: str) -> Encoded:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets
