"""A user's own reward, in TRL's signature: the share of letters in the answer."""

from typing import Any


def most_letters(completions: list[list[dict[str, str]]], **_columns: Any) -> list[float]:
    """One number per completion."""
    texts = [turns[0]["content"] for turns in completions]
    return [sum(c.isalpha() for c in text) / (len(text) + 1) for text in texts]
