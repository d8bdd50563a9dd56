"""Whether a model has an embedding for every token that its tokenizer and template write."""

from collections.abc import Collection
from pathlib import Path

from tokenizers import Tokenizer

from prefpipe.errors import DataError
from prefpipe.models import fingerprint

ADVICE = (
    "the model is incomplete: take the tokenizer that it was trained with, or resize its embedding "
    "(resize_token_embeddings) and train the new tokens"
)


def size(directory: Path) -> int | None:
    """The number of token ids that a model has an embedding for, from its config; None when the config does not say."""
    path = directory / "config.json"
    config = fingerprint.read_json(path) if path.is_file() else {}
    nested = config.get("text_config")
    known = (nested if isinstance(nested, dict) else {}).get("vocab_size") or config.get("vocab_size")
    return known if isinstance(known, int) else None


def check(directory: Path, tokenizer: Tokenizer, template: str, eos_token_ids: Collection[int]) -> None:
    """Raise DataError when text, the chat template or the end of a completion needs a token without an embedding.

    Special tokens that none of these write do no harm: Gemma 3 has such a token, for images.
    """
    known = size(directory)
    if known is None:
        return
    idle = {
        number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and token.content not in template and number not in eos_token_ids
    }
    beyond = {n: t for t, n in tokenizer.get_vocab(with_added_tokens=True).items() if n >= known and n not in idle}
    if beyond:
        first = min(beyond)
        raise DataError(
            f"{directory}: the model has {known} tokens, its tokenizer {len(beyond)} more (first {beyond[first]!r}, id "
            f"{first}): they have no embedding",
            ADVICE,
        )
